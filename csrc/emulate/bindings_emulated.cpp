// The emulated CUDA kernels as the CPU implementation of a second library, minivlm_emulated, beside the C++ kernels'.
#include <ATen/core/Tensor.h>

namespace minivlm {
namespace {

struct Launch {
  explicit Launch(const at::Tensor&) {}
  void* stream() const { return nullptr; }
};

}  // namespace
}  // namespace minivlm

#define MINIVLM_BACKEND cuda
#include "../bindings.h"
#include "../ops.h"

TORCH_LIBRARY(minivlm_emulated, m) { minivlm::define_ops(m); }
TORCH_LIBRARY_IMPL(minivlm_emulated, CPU, m) { minivlm::implement_ops(m); }
