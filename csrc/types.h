// The four element types, and the way from them to the type that sums are kept in and back: `widen` and `narrow`.
#pragma once
#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace minivlm {

// The upper half of a float: 8 bits of exponent, 7 of fraction.
struct bfloat16 {
  uint16_t bits;
};

// IEEE half: 5 bits of exponent, 10 of fraction, largest value 65504.
struct float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

MINIVLM_BOTH inline float widen(float value) { return value; }
MINIVLM_BOTH inline double widen(double value) { return value; }
MINIVLM_BOTH inline void narrow(float value, float& to) { to = value; }
MINIVLM_BOTH inline void narrow(double value, double& to) { to = value; }

#ifdef __CUDACC__
// Spelled out, because torch compiles with CUDA's implicit conversions switched off.
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
#endif

// On a CPU: branch-free integer arithmetic, which compilers vectorise on every machine. Rounding is to nearest, ties to
// even.
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(bfloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

// NaN needs no case of its own: one that came from a bfloat16 or out of arithmetic has zeros below and cannot overflow.
inline void narrow(float value, bfloat16& to) {
  const uint32_t word = bit_cast<uint32_t>(value);
  to.bits = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline float widen(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, abs = uint32_t(value.bits & 0x7fff) << 13;
  const float size = bit_cast<float>(abs) * 0x1p112f;  // exponent from bias 15 to bias 127, subnormals included
  return bit_cast<float>(sign | bit_cast<uint32_t>(size) | (abs >= 0x0f800000 ? 0x7f800000u : 0u));
}

inline void narrow(float value, float16& to) {
  const uint32_t word = bit_cast<uint32_t>(value), sign = (word >> 16) & 0x8000, abs = word & 0x7fffffff;
  const uint32_t normal = (abs - 0x38000000 + 0xfff + ((abs >> 13) & 1)) >> 13;        // from bias 127 to bias 15
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(abs) + 0.5f) - 0x3f000000;  // the adder rounds
  const uint32_t huge = abs > 0x7f800000 ? 0x7e00 : 0x7c00;                            // NaN or infinity
  to.bits = uint16_t(sign | (abs < 0x38800000 ? tiny : abs < 0x47800000 ? normal : huge));
}

// What `value` is after a trip through T.
template <class T>
MINIVLM_BOTH inline Acc<T> rounded(Acc<T> value) {
  T narrowed;
  narrow(value, narrowed);
  return widen(narrowed);
}

// Calls f with a value of the C++ type that `type` names: `by_type<float16, bfloat16>(a.type, [&](auto zero) {...})`.
template <class F16, class BF16, class F>
void by_type(Type type, F f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::f64: return f(double{});
    case Type::f16: return f(F16{});
    case Type::bf16: return f(BF16{});
  }
}

}  // namespace minivlm
