// RMSNorm, alone or after a residual addition, and its gradient. Replaces
//
//   for each row:  total = x (+ residual);  scale = 1 / sqrt(mean(total^2) + eps);
//     y[d] = weight[d] * T(total[d] * scale)
//
// Mapping: one row per warp up to 1024 bf16 elements, one row per block above; a thread moves 16 bytes at a time, about
// four times per row, and loops that only read are unrolled as often, so that four loads are under way before the first
// is used. (With a store in it, nvcc takes the packs of an unrolled loop apart.) The second pass reads the row again,
// from L1, where the first has just put it.
// Memory: 2 * width * sizeof(T) bytes per row, twice that with a residual. About one flop per byte: bandwidth is the
// only limit, so expect the speed of a copy (at an H200's 4 TB/s: 2048 rows of 4096 bf16 in 8 microseconds).
#include "common.cuh"

namespace minivlm::cuda {
namespace {

template <class T, int V, bool ADD>
__global__ void rms_norm_forward(const RmsNorm a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const T *weight = static_cast<const T*>(a.weight), *x = static_cast<const T*>(a.x) + row * a.width;
  T *y = static_cast<T*>(a.y) + row * a.width, *total = static_cast<T*>(a.total) + (ADD ? row * a.width : 0);
  Acc<T> squares = 0;
#pragma unroll(ADD ? 1 : 4)
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    Pack<T, V> pack = load<T, V>(x + d);
    if constexpr (ADD) {
      const Pack<T, V> other = load<T, V>(static_cast<const T*>(a.residual) + row * a.width + d);
      for (int i = 0; i < V; i++) narrow(widen(other.value[i]) + widen(pack.value[i]), pack.value[i]);
      store(total + d, pack);
    }
    for (int i = 0; i < V; i++) squares += widen(pack.value[i]) * widen(pack.value[i]);
  }
  const Acc<T> scale = 1 / sqrt(row_sum(squares) / a.width + Acc<T>(a.eps));
  const T* source = ADD ? total : x;  // a thread reads back only what it wrote itself
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    Pack<T, V> pack = load<T, V>(source + d);
    const Pack<T, V> w = load<T, V>(weight + d);
    for (int i = 0; i < V; i++) narrow(widen(w.value[i]) * rounded<T>(widen(pack.value[i]) * scale), pack.value[i]);
    store(y + d, pack);
  }
}

// With n = x * scale:  grad_x = scale * (weight * grad - n * mean(weight * grad * n)) (+ grad_total). Mapping as above.
template <class T, int V>
__global__ void rms_norm_backward_x(const RmsNormBackward a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const T *weight = static_cast<const T*>(a.weight), *x = static_cast<const T*>(a.x) + row * a.width;
  const T* grad = static_cast<const T*>(a.grad) + row * a.width;
  Acc<T> squares = 0, dot = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    const Pack<T, V> v = load<T, V>(x + d), g = load<T, V>(grad + d), w = load<T, V>(weight + d);
    for (int i = 0; i < V; i++) {
      squares += widen(v.value[i]) * widen(v.value[i]);
      dot += widen(w.value[i]) * widen(g.value[i]) * widen(v.value[i]);
    }
  }
  const Acc<T> scale = 1 / sqrt(row_sum(squares) / a.width + Acc<T>(a.eps));
  dot = row_sum(dot) * scale / a.width;
  if (threadIdx.x == 0) static_cast<Acc<T>*>(a.stats)[row] = scale;
  for (int64_t d = threadIdx.x * V; d < a.width; d += blockDim.x * V) {
    const Pack<T, V> v = load<T, V>(x + d), g = load<T, V>(grad + d), w = load<T, V>(weight + d);
    Pack<T, V> out = {};
    if (a.grad_total) out = load<T, V>(static_cast<const T*>(a.grad_total) + row * a.width + d);
    for (int i = 0; i < V; i++) {
      const Acc<T> through = scale * (widen(w.value[i]) * widen(g.value[i]) - widen(v.value[i]) * scale * dot);
      narrow(a.grad_total ? through + widen(out.value[i]) : through, out.value[i]);
    }
    store(static_cast<T*>(a.grad_x) + row * a.width + d, out);
  }
}

// grad_weight[chunk][d] = sum over the chunk's rows of grad * n. A thread owns V columns and walks down the rows; the
// caller adds the chunks. It reads x and grad a second time: the price of having no atomics, whose order changes from
// run to run.
template <class T, int V>
__global__ void rms_norm_backward_weight(const RmsNormBackward a) {
  const int64_t d = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V, chunk = blockIdx.y;
  if (d >= a.width) return;
  const T *x = static_cast<const T*>(a.x) + d, *grad = static_cast<const T*>(a.grad) + d;
  const Acc<T>* scales = static_cast<const Acc<T>*>(a.stats);
  Acc<T>* grad_weight = static_cast<Acc<T>*>(a.grad_weight) + chunk * a.width + d;
  Acc<T> sum[V] = {};
  for (int64_t row = a.rows * chunk / a.chunks; row < a.rows * (chunk + 1) / a.chunks; row++) {
    const Pack<T, V> v = load<T, V>(x + row * a.width), g = load<T, V>(grad + row * a.width);
    for (int i = 0; i < V; i++) sum[i] += widen(g.value[i]) * rounded<T>(widen(v.value[i]) * scales[row]);
  }
  for (int i = 0; i < V; i++) grad_weight[i] = sum[i];
}

template <class T, int V>
void launch_forward(const RmsNorm& a, void* stream) {
  const dim3 block = row_block(a.width / V), grid(blocks_for(a.rows, block.y));
  launch(a.residual ? rms_norm_forward<T, V, true> : rms_norm_forward<T, V, false>, grid, block, stream, a);
}

template <class T, int V>
void launch_backward(const RmsNormBackward& a, void* stream) {
  const dim3 block = row_block(a.width / V), columns(blocks_for(a.width / V, 128), unsigned(a.chunks));
  if (a.rows > 0) launch(rms_norm_backward_x<T, V>, blocks_for(a.rows, block.y), block, stream, a);
  launch(rms_norm_backward_weight<T, V>, columns, 128, stream, a);
}

}  // namespace

void rms_norm(const RmsNorm& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return;
  by_type<__half, __nv_bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    const bool packs = fits_packs<T>({a.x, a.residual, a.weight, a.y, a.total}, {a.width});
    packs ? launch_forward<T, 16 / sizeof(T)>(a, stream) : launch_forward<T, 1>(a, stream);
  });
}

void rms_norm_backward(const RmsNormBackward& a, void* stream) {
  if (a.width == 0) return;
  by_type<__half, __nv_bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    const bool packs = fits_packs<T>({a.grad, a.grad_total, a.x, a.weight, a.grad_x}, {a.width});
    packs ? launch_backward<T, 16 / sizeof(T)>(a, stream) : launch_backward<T, 1>(a, stream);
  });
}

}  // namespace minivlm::cuda
