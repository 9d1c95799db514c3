// bfloat16, for emulated kernels: the CPU kernels' type under CUDA's name.
#pragma once
#include "../types.h"

using __nv_bfloat16 = minivlm::bfloat16;
