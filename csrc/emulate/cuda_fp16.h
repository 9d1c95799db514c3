// half, for emulated kernels: the CPU kernels' type under CUDA's name.
#pragma once
#include "../types.h"

using __half = minivlm::float16;
