// Marks what runs on the CPU and on the GPU alike.
#pragma once

#ifdef __CUDACC__
#define MINIVLM_BOTH __host__ __device__
#else
#define MINIVLM_BOTH
#endif
