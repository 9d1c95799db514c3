// Rotary embedding of all query and key heads of a token at once, tokens shared out over threads:
//
//   for each token:  angle[j] = position * inv_freq[j]  in float32,  j < K/2
//     for each head: y[j] = x[j] cos - x[j + K/2] sin;   y[j + K/2] = x[j + K/2] cos + x[j] sin
//
// A token's angles are worked out once for its H + G heads and live on the stack; no table of cosines goes through
// memory.
#include <stdexcept>
#include <string>

#include "../sincos.h"
#include "../types.h"
#include "parallel.h"

namespace minivlm::cpu {
namespace {

template <class A>
void turns(const Rope& a, int64_t token, A* cosine, A* sine) {
  for (int section = 0, j = 0; section < a.sections; section++) {
    const int64_t position = a.positions[section * a.batch * a.tokens + token];
    if (position > Rope::max_position || position < -Rope::max_position)
      throw std::out_of_range("apply_rope: position " + std::to_string(position) + " is beyond " +
                              std::to_string(Rope::max_position) + ", where float32 angles end");
    const int end = a.section_end[section];
#pragma omp simd
    for (int i = j; i < end; i++) {
      sincos(float(position) * a.inv_freq[i], sine[i], cosine[i]);
      cosine[i] *= a.scale;
      sine[i] *= a.scale;
    }
    j = end;
  }
}

template <class T>
void rotate(const T* x, T* y, const Acc<T>* cosine, const Acc<T>* sine, int64_t half) {
#pragma omp simd
  for (int64_t j = 0; j < half; j++) {
    const Acc<T> first = widen(x[j]), second = widen(x[j + half]);
    narrow(first * cosine[j] - second * sine[j], y[j]);
    narrow(second * cosine[j] + first * sine[j], y[j + half]);
  }
}

template <class T>
void token_heads(const void* from, const int64_t* strides, void* to, int64_t heads, const Rope& a, int64_t token,
                 const Acc<T>* cosine, const Acc<T>* sine) {
  const T* x = static_cast<const T*>(from) + token / a.tokens * strides[0] + token % a.tokens * strides[1];
  T* y = static_cast<T*>(to) + token * heads * 2 * a.half;
  for (int64_t head = 0; head < heads; head++)
    rotate(x + head * strides[2], y + head * 2 * a.half, cosine, sine, a.half);
}

}  // namespace

void rope(const Rope& a, void*) {
  by_type<float16, bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(a.batch * a.tokens, grain_of((a.q_heads + a.k_heads) * 2 * a.half), [&](int64_t begin, int64_t end) {
      Acc<T> cosine[Rope::max_half], sine[Rope::max_half];
      for (int64_t token = begin; token < end; token++) {
        turns(a, token, cosine, sine);
        token_heads<T>(a.q, a.q_strides, a.q_out, a.q_heads, a, token, cosine, sine);
        token_heads<T>(a.k, a.k_strides, a.k_out, a.k_heads, a, token, cosine, sine);
      }
    });
  });
}

}  // namespace minivlm::cpu
