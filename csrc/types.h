// The two 16-bit floats as bit patterns, converted by branch-free integer arithmetic that compilers vectorise on any machine.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace minivlm {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The upper half of a float: 8 bits of exponent, 7 of fraction.
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float value) {
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to nearest, ties to even
    bits = value != value ? 0x7fc0 : uint16_t(rounded);                   // rounding could turn a NaN into infinity
  }
  operator float() const { return bit_cast<float>(uint32_t(bits) << 16); }
};

// IEEE half: 5 bits of exponent, 10 of fraction, largest value 65504.
struct float16 {
  uint16_t bits;

  float16() = default;
  explicit float16(float value) {
    const uint32_t word = bit_cast<uint32_t>(value), sign = (word >> 16) & 0x8000, abs = word & 0x7fffffff;
    const uint32_t normal = (abs - 0x38000000 + 0xfff + ((abs >> 13) & 1)) >> 13;  // exponent from bias 127 to bias 15
    const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(abs) + 0.5f) - 0x3f000000;  // below 2^-14: the adder rounds for us
    const uint32_t huge = abs > 0x7f800000 ? 0x7e00 : 0x7c00;                            // NaN or infinity
    bits = uint16_t(sign | (abs < 0x38800000 ? tiny : abs < 0x47800000 ? normal : huge));
  }
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, abs = uint32_t(bits & 0x7fff) << 13;
    const float value = bit_cast<float>(abs) * 0x1p112f;  // exponent from bias 15 to bias 127, subnormals included
    return bit_cast<float>(sign | bit_cast<uint32_t>(value) | (abs >= 0x0f800000 ? 0x7f800000u : 0u));
  }
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
