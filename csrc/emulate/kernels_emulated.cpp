// The CUDA kernels, compiled for the CPU: build with -I csrc/emulate, so that <cuda_runtime.h> is the emulation.
#include "../cuda/patch_merge.cu"
#include "../cuda/patchify.cu"
#include "../cuda/rms_norm.cu"
#include "../cuda/rope.cu"
