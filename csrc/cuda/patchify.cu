// Frames of bytes to rows of numbers that a vision tower takes. Replaces
//
//   for each patch, colour, frame of the patch, line and pixel:  y[...] = table[colour][pixels[...]]
//
// Mapping: one block per eight patches, with the table in shared memory. A thread owns a place within the patch, works
// out once where that is in a picture (three divisions), and serves all eight patches. Neighbouring threads write
// neighbouring numbers: a warp's stores fill whole lines of 128 bytes, one number per thread. Packs of 16 bytes would
// gain nothing there, and a warp's reads of single bytes would be spread over four times as many lines.
// Memory: per number of a patch one byte read, or none for a frame that is repeated, and sizeof(T) written. Qwen2-VL's
// float32 patch is 4.7 kB (at an H200's 4 TB/s the 5184 patches of 1008 x 1008 pixels in 7 microseconds).
#include "common.cuh"

namespace minivlm::cuda {
namespace {

constexpr int patches_per_block = 8;

template <class T>
__global__ void patchify_look_up(const Patchify a) {
  __shared__ T table[3 * 256];
  __shared__ int64_t first_frame[patches_per_block], corner[patches_per_block];  // of each patch; in bytes
  for (int i = threadIdx.x; i < 3 * 256; i += blockDim.x) table[i] = static_cast<const T*>(a.table)[i];
  const int64_t start = int64_t(blockIdx.x) * patches_per_block, total = a.patches;
  const int count = total - start < patches_per_block ? int(total - start) : patches_per_block;
  if (const int i = threadIdx.x; i < count) {
    const int64_t rows = a.height / a.side, columns = a.width / a.side, patch = start + i;
    first_frame[i] = patch / (rows * columns) * a.depth;
    corner[i] = (patch / columns % rows * a.width + patch % columns) * a.side * 3;
  }
  __syncthreads();
  const int64_t size = 3 * a.depth * a.side * a.side;  // of a patch
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const uint32_t side = uint32_t(a.side), line = uint32_t(i) / side, plane = line / side, depth = uint32_t(a.depth);
    const uint32_t colour = plane / depth, f = plane % depth;
    const int64_t inside = (int64_t(line % side) * a.width + i % side) * 3 + colour;
    T* y = static_cast<T*>(a.y) + start * size + i;
#pragma unroll 4
    for (int patch = 0; patch < count; patch++, y += size) {
      const int64_t frame = first_frame[patch] + f < a.frames ? first_frame[patch] + f : a.frames - 1;
      *y = table[colour * 256 + a.pixels[frame * a.height * a.width * 3 + corner[patch] + inside]];
    }
  }
}

}  // namespace

void patchify(const Patchify& a, void* stream) {
  if (a.patches == 0) return;
  by_type<__half, __nv_bfloat16>(a.type, [&](auto zero) {
    launch(patchify_look_up<decltype(zero)>, blocks_for(a.patches, patches_per_block), 256, stream, a);
  });
}

}  // namespace minivlm::cuda
