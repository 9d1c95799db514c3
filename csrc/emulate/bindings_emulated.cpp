// The emulated CUDA kernels as the CPU implementation of a second library, minivlm_emulated, beside the C++ kernels' one.
#include <ATen/core/Tensor.h>

namespace minivlm {
namespace {

struct Launch {
  explicit Launch(const at::Tensor&) {}
  void* stream() const { return nullptr; }
};

}  // namespace
}  // namespace minivlm

#define MINIVLM_LIBRARY minivlm_emulated
#define MINIVLM_BACKEND cuda
#define MINIVLM_KEY CPU
#include "../bindings.h"
