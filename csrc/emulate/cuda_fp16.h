// half, for emulated kernels: the CPU kernels' float16 under CUDA's names.
#pragma once
#include "../types.h"

using __half = minivlm::float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return __half(value); }
