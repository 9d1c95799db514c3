// Rotary embedding of queries and keys in one launch. Replaces
//
//   for each token:  angle[j] = position * inv_freq[j],  j < K/2
//     for each of H + G heads:  y[j] = x[j] cos - x[j + K/2] sin;   y[j + K/2] = x[j + K/2] cos + x[j] sin
//
// Mapping: one block per token. Its threads first work out the token's K/2 sines and cosines into shared memory, once
// for all heads, then take (head, pack of pairs) after (head, pack of pairs), 16 bytes from each half of a head.
// Memory: 2 * (H + G) * K * sizeof(T) bytes per token and nothing else, since no table of cosines is read: expect the
// speed of a copy (Qwen2-VL-7B, H + G = 32, K = 128, bf16: 16 kB per token; at 4 TB/s 2048 tokens in 8 microseconds).
// A position beyond 2^24, where float32 skips integers, turns its token into NaN: as loud as a kernel can be.
#include "../sincos.h"
#include "common.cuh"

namespace minivlm::cuda {
namespace {

template <class T, int V>
__global__ void rope_rotate(const Rope a) {
  __shared__ Acc<T> cosine[Rope::max_half], sine[Rope::max_half];
  const int64_t token = blockIdx.x, b = token / a.tokens, t = token % a.tokens;
  const int half = int(a.half);
  for (int j = threadIdx.x; j < half; j += blockDim.x) {
    int section = 0;
    while (j >= a.section_end[section]) section++;
    const int64_t position = a.positions[section * a.batch * a.tokens + token];
    const bool valid = position <= Rope::max_position && position >= -Rope::max_position;
    const float scale = valid ? a.scale : nanf("");
    minivlm::sincos(float(position) * a.inv_freq[j], sine[j], cosine[j]);
    sine[j] *= scale;
    cosine[j] *= scale;
  }
  __syncthreads();
  const int packs = half / V, heads = int(a.q_heads + a.k_heads);
  for (int i = threadIdx.x; i < heads * packs; i += blockDim.x) {
    const bool is_q = i < a.q_heads * packs;
    const int64_t head = is_q ? i / packs : i / packs - a.q_heads, j = i % packs * V;
    const int64_t from = is_q ? b * a.q_strides[0] + t * a.q_strides[1] + head * a.q_strides[2]
                              : b * a.k_strides[0] + t * a.k_strides[1] + head * a.k_strides[2];
    const int64_t to = (token * (is_q ? a.q_heads : a.k_heads) + head) * 2 * half;
    const T* x = static_cast<const T*>(is_q ? a.q : a.k) + from + j;
    T* y = static_cast<T*>(is_q ? a.q_out : a.k_out) + to + j;
    Pack<T, V> first = load<T, V>(x), second = load<T, V>(x + half);
    for (int v = 0; v < V; v++) {
      const Acc<T> f = widen(first.value[v]), s = widen(second.value[v]);
      narrow(f * cosine[j + v] - s * sine[j + v], first.value[v]);
      narrow(s * cosine[j + v] + f * sine[j + v], second.value[v]);
    }
    store(y, first);
    store(y + half, second);
  }
}

}  // namespace

void rope(const Rope& a, void* stream) {
  if (a.batch * a.tokens == 0) return;
  by_type<__half, __nv_bfloat16>(a.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const int64_t *qs = a.q_strides, *ks = a.k_strides;
    const bool packs = fits_packs<T>({a.q, a.k, a.q_out, a.k_out}, {a.half, qs[0], qs[1], qs[2], ks[0], ks[1], ks[2]});
    const int64_t work = (a.q_heads + a.k_heads) * (packs ? a.half / V : a.half);
    unsigned threads = 32;
    while (threads < 256 && threads * 2 < work) threads *= 2;  // two packs per thread or more
    launch(packs ? rope_rotate<T, V> : rope_rotate<T, 1>, blocks_for(a.batch * a.tokens, 1), threads, stream, a);
  });
}

}  // namespace minivlm::cuda
