// The CUDA kernels as torch's CUDA implementation, on the tensor's device and torch's current stream.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace minivlm {
namespace {

struct Launch {
  c10::cuda::CUDAGuard device;
  explicit Launch(const at::Tensor& x) : device(x.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
};

}  // namespace
}  // namespace minivlm

#define MINIVLM_BACKEND cuda
#include "../bindings.h"

TORCH_LIBRARY_IMPL(minivlm, CUDA, m) { minivlm::implement_ops(m); }
