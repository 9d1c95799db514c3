// What the kernels share: 16-byte packs, sums over a row, and the launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../types.h"

namespace minivlm::cuda {

// V neighbours of a row, moved by one instruction: 16 bytes' worth, or a single one where alignment allows no more.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <class T, int V>
__device__ inline Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V>
__device__ inline void store(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// The sum over all threads that share a row, given to each of them: within a warp by shuffles, between warps through
// shared memory. Always in the same order, so that two runs agree to the last bit. All threads of the block must call
// it, unless a row is one warp wide.
template <class A>
__device__ inline A row_sum(A value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (blockDim.x == 32) return value;
  __shared__ A of_warp[32];
  const int warps = blockDim.x / 32;
  __syncthreads();  // the sum before this one may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < warps; warp++) sum += of_warp[warp];
  return sum;
}

// How a block lies on rows of `packs` packs: so many threads that each moves about four, and never fewer than a warp.
// Rows that one warp can carry share a block of four.
inline dim3 row_block(int64_t packs) {
  unsigned threads = 32;
  while (threads < 1024 && int64_t(threads) * 4 < packs) threads *= 2;
  return dim3(threads, threads == 32 ? 4 : 1);
}

inline unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw std::runtime_error("minivlm: too many rows for a launch: " + std::to_string(count));
  return unsigned(blocks);
}

// Whether every pointer and every step from row to row allows 16-byte packs.
template <class T>
bool fits_packs(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> steps) {
  const bool aligned = std::all_of(pointers.begin(), pointers.end(), [](auto p) { return uintptr_t(p) % 16 == 0; });
  const bool whole = std::all_of(steps.begin(), steps.end(), [](auto step) { return step * sizeof(T) % 16 == 0; });
  return aligned && whole;
}

// kernel<<<grid, block>>>(a) on a stream, with the check that is so easily forgotten.
template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, dim3 block, void* stream, const Arguments& a) {
#ifdef __CUDACC__
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(a);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("minivlm: no launch: ") + cudaGetErrorString(error));
#else
  (void)stream;  // emulated: finished when it returns
  emulate::launch(kernel, grid, block, a);
#endif
}

}  // namespace minivlm::cuda
