// LayerNorm of every patch, written straight to its place in the merged order:
//
//   for each slot:  x = patches[source(slot)];  y[slot][d] = (x[d] - mean) / sqrt(variance + eps) * weight[d] + bias[d]
//
// One read and one write per element, where LayerNorm followed by a permuting copy takes two of each.
#include <algorithm>
#include <cmath>

#include "../patch_order.h"
#include "../types.h"
#include "parallel.h"

namespace minivlm::cpu {
namespace {

template <class A>
struct Moments {
  A mean, scale;  // scale = 1 / sqrt(variance + eps)
};

template <class T>
Moments<Acc<T>> moments(const T* x, int64_t width, double eps) {
  Acc<T> sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; d++) sum += widen(x[d]);
  const Acc<T> mean = sum / width;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; d++) squares += (widen(x[d]) - mean) * (widen(x[d]) - mean);
  return {mean, 1 / std::sqrt(squares / width + Acc<T>(eps))};
}

template <class T>
void forward_slot(const PatchMerge& a, int64_t slot) {
  const T* x = static_cast<const T*>(a.x) + source_patch(slot, a.grids, a.merge) * a.width;
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + slot * a.width;
  const auto m = moments(x, a.width, a.eps);
#pragma omp simd
  for (int64_t d = 0; d < a.width; d++)
    narrow((widen(x[d]) - m.mean) * m.scale * widen(weight[d]) + widen(bias[d]), y[d]);
}

// With n = (x - mean) * scale and g = weight * grad:  grad_x = scale * (g - mean(g) - n * mean(g * n)),
// grad_weight = sum over rows of grad * n,  grad_bias = sum of grad.
template <class T>
void backward_slot(const PatchMergeBackward& a, int64_t slot, Acc<T>* grad_weight, Acc<T>* grad_bias) {
  const int64_t patch = source_patch(slot, a.grids, a.merge);
  const T* grad = static_cast<const T*>(a.grad) + slot * a.width;
  const T* x = static_cast<const T*>(a.x) + patch * a.width;
  const T* weight = static_cast<const T*>(a.weight);
  T* grad_x = static_cast<T*>(a.grad_x) + patch * a.width;
  const auto m = moments(x, a.width, a.eps);
  Acc<T> sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t d = 0; d < a.width; d++) {
    const Acc<T> g = widen(grad[d]), normed = (widen(x[d]) - m.mean) * m.scale;
    sum += widen(weight[d]) * g;
    dot += widen(weight[d]) * g * normed;
    grad_weight[d] += g * normed;
    grad_bias[d] += g;
  }
  sum /= a.width, dot /= a.width;
#pragma omp simd
  for (int64_t d = 0; d < a.width; d++) {
    const Acc<T> normed = (widen(x[d]) - m.mean) * m.scale;
    narrow(m.scale * (widen(weight[d]) * widen(grad[d]) - sum - normed * dot), grad_x[d]);
  }
}

}  // namespace

void patch_merge(const PatchMerge& a, void*) {
  by_type<float16, bfloat16>(a.type, [&](auto zero) {
    parallel_for(a.patches, grain_of(a.width), [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; slot++) forward_slot<decltype(zero)>(a, slot);
    });
  });
}

void patch_merge_backward(const PatchMergeBackward& a, void*) {
  by_type<float16, bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(a.chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        Acc<T>* grad_weight = static_cast<Acc<T>*>(a.grad_weight) + chunk * a.width;
        Acc<T>* grad_bias = static_cast<Acc<T>*>(a.grad_bias) + chunk * a.width;
        std::fill(grad_weight, grad_weight + a.width, Acc<T>(0));
        std::fill(grad_bias, grad_bias + a.width, Acc<T>(0));
        for (int64_t slot = a.patches * chunk / a.chunks; slot < a.patches * (chunk + 1) / a.chunks; slot++)
          backward_slot<T>(a, slot, grad_weight, grad_bias);
      }
    });
  });
}

}  // namespace minivlm::cpu
