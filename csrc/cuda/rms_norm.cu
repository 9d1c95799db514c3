// RMSNorm, alone or after a residual addition, and its gradient. Replaces
//
//   for each row:  total = x (+ residual);  scale = rsqrt(mean(total^2) + eps);  y[d] = weight[d] * T(total[d] * scale)
//
// Mapping: one row per warp up to 1024 bf16 elements, one row per block above; a thread moves 16 bytes at a time, about four
// times per row. The second pass reads the row again, from L1, where the first has just put it.
// Memory: 2 * width * sizeof(T) bytes per row, 4 * with a residual. Two flops per byte: bandwidth is the only limit, so expect
// the speed of a copy (an H200 copies at about 4 TB/s: 2048 rows of 4096 bf16 in 8 microseconds).
#include "common.cuh"

namespace minivlm::cuda {
namespace {

template <class T, int V>
__global__ void rms_norm_forward(const T* x, const T* residual, const T* weight, T* y, T* total, int64_t rows, int64_t width, double eps) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const T* normed = residual ? total : x;  // a thread reads back only what it wrote itself
  Acc<T> squares = 0;
  for (int64_t d = threadIdx.x * V; d < width; d += blockDim.x * V) {
    Pack<T, V> pack = load<T, V>(x + row * width + d);
    if (residual) {
      const Pack<T, V> other = load<T, V>(residual + row * width + d);
      for (int i = 0; i < V; i++) narrow(widen(other.value[i]) + widen(pack.value[i]), pack.value[i]);
      store(total + row * width + d, pack);
    }
    for (int i = 0; i < V; i++) squares += widen(pack.value[i]) * widen(pack.value[i]);
  }
  const Acc<T> scale = 1 / sqrt(row_sum(squares) / width + Acc<T>(eps));
  for (int64_t d = threadIdx.x * V; d < width; d += blockDim.x * V) {
    Pack<T, V> pack = load<T, V>(normed + row * width + d);
    const Pack<T, V> w = load<T, V>(weight + d);
    for (int i = 0; i < V; i++) narrow(widen(w.value[i]) * rounded<T>(widen(pack.value[i]) * scale), pack.value[i]);
    store(y + row * width + d, pack);
  }
}

// With n = x * scale:  grad_x = scale * (weight * grad - n * mean(weight * grad * n)) (+ grad_total). Same mapping as forward.
template <class T, int V>
__global__ void rms_norm_backward_x(const T* grad, const T* grad_total, const T* x, const T* weight, T* grad_x, Acc<T>* scales,
                           int64_t rows, int64_t width, double eps) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  Acc<T> squares = 0, dot = 0;
  for (int64_t d = threadIdx.x * V; d < width; d += blockDim.x * V) {
    const Pack<T, V> v = load<T, V>(x + row * width + d), g = load<T, V>(grad + row * width + d), w = load<T, V>(weight + d);
    for (int i = 0; i < V; i++) {
      squares += widen(v.value[i]) * widen(v.value[i]);
      dot += widen(w.value[i]) * widen(g.value[i]) * widen(v.value[i]);
    }
  }
  const Acc<T> scale = 1 / sqrt(row_sum(squares) / width + Acc<T>(eps));
  dot = row_sum(dot) * scale / width;
  if (threadIdx.x == 0) scales[row] = scale;
  for (int64_t d = threadIdx.x * V; d < width; d += blockDim.x * V) {
    const Pack<T, V> v = load<T, V>(x + row * width + d), g = load<T, V>(grad + row * width + d), w = load<T, V>(weight + d);
    Pack<T, V> out = {};
    if (grad_total) out = load<T, V>(grad_total + row * width + d);
    for (int i = 0; i < V; i++) {
      const Acc<T> through = scale * (widen(w.value[i]) * widen(g.value[i]) - widen(v.value[i]) * scale * dot);
      narrow(grad_total ? through + widen(out.value[i]) : through, out.value[i]);
    }
    store(grad_x + row * width + d, out);
  }
}

// grad_weight[chunk][d] = sum over the chunk's rows of grad * n. A thread owns V columns and walks down the rows; the caller adds
// the chunks. It reads x and grad a second time: the price of having no atomics and no order that changes from run to run.
template <class T, int V>
__global__ void rms_norm_backward_weight(const T* grad, const T* x, const Acc<T>* scales, Acc<T>* grad_weight, int64_t rows, int64_t width,
                                int64_t chunks) {
  const int64_t d = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V, chunk = blockIdx.y;
  if (d >= width) return;
  Acc<T> sum[V] = {};
  for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
    const Pack<T, V> v = load<T, V>(x + row * width + d), g = load<T, V>(grad + row * width + d);
    for (int i = 0; i < V; i++) sum[i] += widen(g.value[i]) * rounded<T>(widen(v.value[i]) * scales[row]);
  }
  for (int i = 0; i < V; i++) grad_weight[chunk * width + d + i] = sum[i];
}

template <class T, int V>
void launch_forward(const RmsNorm& a, void* stream) {
  const dim3 block = row_block(a.width / V);
  launch(rms_norm_forward<T, V>, blocks_for(a.rows, block.y), block, stream, static_cast<const T*>(a.x), static_cast<const T*>(a.residual),
         static_cast<const T*>(a.weight), static_cast<T*>(a.y), static_cast<T*>(a.total), a.rows, a.width, a.eps);
}

template <class T, int V>
void launch_backward(const RmsNormBackward& a, void* stream) {
  const dim3 block = row_block(a.width / V);
  const auto *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
  auto* scales = static_cast<Acc<T>*>(a.stats);
  if (a.rows > 0)
    launch(rms_norm_backward_x<T, V>, blocks_for(a.rows, block.y), block, stream, grad, static_cast<const T*>(a.grad_total), x,
           static_cast<const T*>(a.weight), static_cast<T*>(a.grad_x), scales, a.rows, a.width, a.eps);
  launch(rms_norm_backward_weight<T, V>, dim3(blocks_for(a.width / V, 128), unsigned(a.chunks)), dim3(128), stream, grad, x, scales,
         static_cast<Acc<T>*>(a.grad_weight), a.rows, a.width, a.chunks);
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
