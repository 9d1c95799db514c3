// The C++ kernels as torch's CPU implementation, with torch's threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "parallel.h"

namespace minivlm {

void cpu::parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, grain, body);
}

namespace {
struct Launch {
  explicit Launch(const at::Tensor&) {}
  void* stream() const { return nullptr; }
};
}  // namespace

}  // namespace minivlm

#define MINIVLM_BACKEND cpu
#include "../bindings.h"
#include "../ops.h"

TORCH_LIBRARY(minivlm, m) { minivlm::define_ops(m); }
TORCH_LIBRARY_IMPL(minivlm, CPU, m) { minivlm::implement_ops(m); }
