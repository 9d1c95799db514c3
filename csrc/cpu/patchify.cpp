// Frames of bytes to rows of numbers that a vision tower takes:
//
//   for each patch, colour, frame of the patch, line and pixel:  y[...] = table[colour][pixels[...]]
//
// A patch is written front to back while its few lines are read from cache, so every byte and every number goes through
// memory once, where rescaling, normalising and permuting one after the other make half a dozen trips.
#include <algorithm>

#include "../types.h"
#include "parallel.h"

namespace minivlm::cpu {
namespace {

template <class T>
void one_patch(const Patchify& a, int64_t patch) {
  const int64_t rows = a.height / a.side, columns = a.width / a.side, area = a.side * a.side;
  const int64_t t = patch / (rows * columns), row = patch / columns % rows, column = patch % columns;
  const uint8_t* corner = a.pixels + (row * a.side * a.width + column * a.side) * 3;  // in the first frame
  T* y = static_cast<T*>(a.y) + patch * 3 * a.depth * area;
  for (int colour = 0; colour < 3; colour++) {
    const T* table = static_cast<const T*>(a.table) + colour * 256;
    for (int64_t f = 0; f < a.depth; f++, y += area) {
      const int64_t frame = t * a.depth + f;
      if (frame >= a.frames) {  // the last frame again: it has just been written
        std::copy(y - area, y, y);
        continue;
      }
      const uint8_t* line = corner + frame * a.height * a.width * 3 + colour;
      for (int64_t i = 0; i < a.side; i++, line += a.width * 3)
        for (int64_t j = 0; j < a.side; j++) y[i * a.side + j] = table[line[j * 3]];
    }
  }
}

}  // namespace

void patchify(const Patchify& a, void*) {
  by_type<float16, bfloat16>(a.type, [&](auto zero) {
    parallel_for(a.patches, grain_of(3 * a.depth * a.side * a.side), [&](int64_t begin, int64_t end) {
      for (int64_t patch = begin; patch < end; patch++) one_patch<decltype(zero)>(a, patch);
    });
  });
}

}  // namespace minivlm::cpu
