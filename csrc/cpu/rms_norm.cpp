// RMSNorm and its gradient, rows shared out over threads. The loop nest is the definition:
//
//   for each row:  scale = 1 / sqrt(mean(x^2) + eps);   y[d] = weight[d] * T(x[d] * scale)
//
// `omp simd` lets the compiler keep one partial sum per vector lane, which plain C++ forbids, because it changes the
// order of the additions. Memory: one read and one write per element (two and two with a residual); the second pass
// finds the row in cache.
#include <algorithm>
#include <cmath>

#include "../types.h"
#include "parallel.h"

namespace minivlm::cpu {
namespace {

template <class T>
Acc<T> inverse_rms(const T* x, int64_t width, double eps) {
  Acc<T> squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; d++) squares += widen(x[d]) * widen(x[d]);
  return 1 / std::sqrt(squares / width + Acc<T>(eps));
}

template <class T>
void forward_row(const RmsNorm& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  const T* weight = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y) + row * a.width;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.width;
    T* total = static_cast<T*>(a.total) + row * a.width;
#pragma omp simd
    for (int64_t d = 0; d < a.width; d++) narrow(widen(residual[d]) + widen(x[d]), total[d]);
    x = total;
  }
  const Acc<T> scale = inverse_rms(x, a.width, a.eps);
#pragma omp simd
  for (int64_t d = 0; d < a.width; d++) narrow(widen(weight[d]) * rounded<T>(widen(x[d]) * scale), y[d]);
}

// With n = x * scale:  grad_x = scale * (weight * grad - n * mean(weight * grad * n)) (+ grad_total),
// grad_weight = sum over rows of grad * n.
template <class T>
void backward_row(const RmsNormBackward& a, int64_t row, Acc<T>* grad_weight) {
  const T* grad = static_cast<const T*>(a.grad) + row * a.width;
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  const T* weight = static_cast<const T*>(a.weight);
  T* grad_x = static_cast<T*>(a.grad_x) + row * a.width;
  const Acc<T> scale = inverse_rms(x, a.width, a.eps);
  Acc<T> dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < a.width; d++) {
    dot += widen(weight[d]) * widen(grad[d]) * widen(x[d]);
    grad_weight[d] += widen(grad[d]) * rounded<T>(widen(x[d]) * scale);
  }
  dot *= scale / a.width;
  const T* grad_total = a.grad_total ? static_cast<const T*>(a.grad_total) + row * a.width : nullptr;
#pragma omp simd
  for (int64_t d = 0; d < a.width; d++) {
    const Acc<T> through = scale * (widen(weight[d]) * widen(grad[d]) - widen(x[d]) * scale * dot);
    narrow(grad_total ? through + widen(grad_total[d]) : through, grad_x[d]);
  }
}

}  // namespace

void rms_norm(const RmsNorm& a, void*) {
  by_type<float16, bfloat16>(a.type, [&](auto zero) {
    parallel_for(a.rows, grain_of(a.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) forward_row<decltype(zero)>(a, row);
    });
  });
}

void rms_norm_backward(const RmsNormBackward& a, void*) {
  by_type<float16, bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(a.chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        Acc<T>* grad_weight = static_cast<Acc<T>*>(a.grad_weight) + chunk * a.width;
        std::fill(grad_weight, grad_weight + a.width, Acc<T>(0));
        for (int64_t row = a.rows * chunk / a.chunks; row < a.rows * (chunk + 1) / a.chunks; row++)
          backward_row<T>(a, row, grad_weight);
      }
    });
  });
}

}  // namespace minivlm::cpu
