// bfloat16, for emulated kernels: the CPU kernels' type under CUDA's names.
#pragma once
#include "../types.h"

using __nv_bfloat16 = minivlm::bfloat16;
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
