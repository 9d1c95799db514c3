// The ops as torch knows them: what bindings_cpu.cpp defines for the library `minivlm` and bindings_emulated.cpp for
// `minivlm_emulated`. Their meaning stands in minivlm/ops/, one file per op, in five lines of torch each.
#pragma once
#include <torch/library.h>

namespace minivlm {

inline void define_ops(torch::Library& m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor residual, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, int[]? sections=None, float scale=1.0) "
      "-> (Tensor, Tensor)");
  m.def("patch_merge(Tensor x, Tensor grid_thw, int merge, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "patch_merge_backward(Tensor grad, Tensor x, Tensor grid_thw, int merge, Tensor weight, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("patchify(Tensor pixels, Tensor table, int depth, int side) -> Tensor");
}

}  // namespace minivlm
