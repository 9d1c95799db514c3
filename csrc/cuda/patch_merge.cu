// LayerNorm of every patch, written straight to its place in the merged order, and its gradient. Replaces
//
//   for each slot:  x = patches[source(slot)];  y[slot][d] = (x[d] - mean) / sqrt(variance + eps) * weight[d] + bias[d]
//
// Mapping: as in rms_norm.cu, one slot per warp or block; every thread works out the slot's source for itself, by
// walking the list of pictures, which is short and in cache. Of the three passes over a row two find it in L1.
// Memory: 2 * width * sizeof(T) bytes per patch, half of what LayerNorm followed by a permuting copy moves (Qwen2-VL,
// width 1280, bf16: 5 kB per patch; at an H200's 4 TB/s 16384 patches in 21 microseconds).
#include "../patch_order.h"
#include "common.cuh"

namespace minivlm::cuda {
namespace {

template <class T, int V>
__device__ inline Acc<T> mean_of(const T* x, int64_t width) {
  Acc<T> sum = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x * V; d < width; d += blockDim.x * V) {
    const Pack<T, V> pack = load<T, V>(x + d);
    for (int i = 0; i < V; i++) sum += widen(pack.value[i]);
  }
  return row_sum(sum) / width;
}

// 1 / sqrt(variance + eps), from the differences to the mean: the mean of squares less the square of the mean would
// cancel.
template <class T, int V>
__device__ inline Acc<T> scale_of(const T* x, Acc<T> mean, int64_t width, double eps) {
  Acc<T> squares = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x * V; d < width; d += blockDim.x * V) {
    const Pack<T, V> pack = load<T, V>(x + d);
    for (int i = 0; i < V; i++) squares += (widen(pack.value[i]) - mean) * (widen(pack.value[i]) - mean);
  }
  return 1 / sqrt(row_sum(squares) / width + Acc<T>(eps));
}

template <class T, int V>
__global__ void patch_merge_forward(const PatchMerge a) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (slot >= a.patches) return;
  const T* x = static_cast<const T*>(a.x) + source_patch(slot, a.grids, a.merge) * a.width;
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const Acc<T> mean = mean_of<T, V>(x, a.width), scale = scale_of<T, V>(x, mean, a.width, a.eps);
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    Pack<T, V> pack = load<T, V>(x + d);
    const Pack<T, V> w = load<T, V>(weight + d), b = load<T, V>(bias + d);
    for (int i = 0; i < V; i++)
      narrow((widen(pack.value[i]) - mean) * scale * widen(w.value[i]) + widen(b.value[i]), pack.value[i]);
    store(static_cast<T*>(a.y) + slot * a.width + d, pack);
  }
}

// With n = (x - mean) * scale and g = weight * grad:  grad_x = scale * (g - mean(g) - n * mean(g * n)).
template <class T, int V>
__global__ void patch_merge_backward_x(const PatchMergeBackward a) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (slot >= a.patches) return;
  const int64_t patch = source_patch(slot, a.grids, a.merge);
  const T *weight = static_cast<const T*>(a.weight), *x = static_cast<const T*>(a.x) + patch * a.width;
  const T* grad = static_cast<const T*>(a.grad) + slot * a.width;
  const Acc<T> mean = mean_of<T, V>(x, a.width), scale = scale_of<T, V>(x, mean, a.width, a.eps);
  Acc<T> sum = 0, dot = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    const Pack<T, V> v = load<T, V>(x + d), g = load<T, V>(grad + d), w = load<T, V>(weight + d);
    for (int i = 0; i < V; i++) {
      sum += widen(w.value[i]) * widen(g.value[i]);
      dot += widen(w.value[i]) * widen(g.value[i]) * (widen(v.value[i]) - mean) * scale;
    }
  }
  sum = row_sum(sum) / a.width;
  dot = row_sum(dot) / a.width;
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    const Pack<T, V> v = load<T, V>(x + d), g = load<T, V>(grad + d), w = load<T, V>(weight + d);
    Pack<T, V> out;
    for (int i = 0; i < V; i++) {
      const Acc<T> normed = (widen(v.value[i]) - mean) * scale;
      narrow(scale * (widen(w.value[i]) * widen(g.value[i]) - sum - normed * dot), out.value[i]);
    }
    store(static_cast<T*>(a.grad_x) + patch * a.width + d, out);
  }
  if (threadIdx.x == 0) {  // for the kernel below
    static_cast<Acc<T>*>(a.stats)[2 * slot] = mean;
    static_cast<Acc<T>*>(a.stats)[2 * slot + 1] = scale;
    a.sources[slot] = patch;
  }
}

// Sums over the chunk's slots of grad * n and of grad; a thread owns V columns. The caller adds the chunks.
template <class T, int V>
__global__ void patch_merge_backward_weight(const PatchMergeBackward a) {
  const int64_t d = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V, chunk = blockIdx.y;
  if (d >= a.width) return;
  const T *x = static_cast<const T*>(a.x) + d, *grad = static_cast<const T*>(a.grad) + d;
  const Acc<T>* stats = static_cast<const Acc<T>*>(a.stats);
  Acc<T> of_weight[V] = {}, of_bias[V] = {};
  for (int64_t slot = a.patches * chunk / a.chunks; slot < a.patches * (chunk + 1) / a.chunks; slot++) {
    const Pack<T, V> v = load<T, V>(x + a.sources[slot] * a.width), g = load<T, V>(grad + slot * a.width);
    for (int i = 0; i < V; i++) {
      of_weight[i] += widen(g.value[i]) * (widen(v.value[i]) - stats[2 * slot]) * stats[2 * slot + 1];
      of_bias[i] += widen(g.value[i]);
    }
  }
  for (int i = 0; i < V; i++) {
    static_cast<Acc<T>*>(a.grad_weight)[chunk * a.width + d + i] = of_weight[i];
    static_cast<Acc<T>*>(a.grad_bias)[chunk * a.width + d + i] = of_bias[i];
  }
}

template <class T, int V>
void launch_backward(const PatchMergeBackward& a, void* stream) {
  const dim3 block = row_block(a.width / V), columns(blocks_for(a.width / V, 128), unsigned(a.chunks));
  if (a.patches > 0) launch(patch_merge_backward_x<T, V>, blocks_for(a.patches, block.y), block, stream, a);
  launch(patch_merge_backward_weight<T, V>, columns, 128, stream, a);
}

}  // namespace

void patch_merge(const PatchMerge& a, void* stream) {
  if (a.patches == 0 || a.width == 0) return;
  by_type<__half, __nv_bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const bool packs = fits_packs<T>({a.x, a.weight, a.bias, a.y}, {a.width});
    const dim3 block = row_block(packs ? a.width / V : a.width), grid(blocks_for(a.patches, block.y));
    launch(packs ? patch_merge_forward<T, V> : patch_merge_forward<T, 1>, grid, block, stream, a);
  });
}

void patch_merge_backward(const PatchMergeBackward& a, void* stream) {
  if (a.width == 0) return;
  by_type<__half, __nv_bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    const bool packs = fits_packs<T>({a.grad, a.x, a.weight, a.grad_x}, {a.width});
    packs ? launch_backward<T, 16 / sizeof(T)>(a, stream) : launch_backward<T, 1>(a, stream);
  });
}

}  // namespace minivlm::cuda
