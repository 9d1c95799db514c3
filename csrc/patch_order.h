// The permutation that merging is: which raster-ordered patch stands where in the merged order.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace minivlm {

// Merged order walks the cells of every picture in raster order, and the merge x merge patches of a cell row by row.
//
//   raster, 2 x 4:   0 1 2 3      merged, merge = 2:   0 1 4 5 | 2 3 6 7
//                    4 5 6 7
//
// `grids` is (pictures, 3): frames, rows, columns. The caller has checked that `slot` lies within them and that no
// picture has 2^31 patches, so that the divisions are 32-bit ones, which GPUs do several times faster. Frames need no
// mention: rows are a multiple of `merge`, so a film is a picture of frames * rows rows.
MINIVLM_BOTH inline int64_t source_patch(int64_t slot, const int64_t* grids, int64_t merge) {
  int64_t first = 0;  // patch of this picture
  for (int64_t patches; slot >= first + (patches = grids[0] * grids[1] * grids[2]); grids += 3) first += patches;
  const uint32_t m = uint32_t(merge), columns = uint32_t(grids[2]);
  const uint32_t cell = uint32_t(slot - first) / (m * m), inside = uint32_t(slot - first) % (m * m);
  const uint32_t row = cell / (columns / m) * m + inside / m;
  const uint32_t column = cell % (columns / m) * m + inside % m;
  return first + int64_t(row) * columns + column;
}

}  // namespace minivlm
