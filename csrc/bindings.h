// Joins the kernels to torch: checks what would be unsafe, allocates, launches. Included by one bindings_*.cpp per backend, which has
// defined before: MINIVLM_BACKEND, the namespace of its kernels; and `Launch`, made from a tensor, which holds what a launch there
// needs and gives the stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace minivlm {
namespace {

using at::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kDouble: return Type::f64;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default: TORCH_CHECK(false, "minivlm: no kernel for ", x.scalar_type(), "; use float32, float16, bfloat16 or float64");
  }
}

Tensor empty_acc(at::IntArrayRef shape, const Tensor& like) {  // of the type that sums over `like` are kept in
  return at::empty(shape, like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

// Row sums in pieces, to be added afterwards: enough pieces to keep a machine busy, and a number that depends on nothing but rows.
int64_t chunks_for(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 256); }

void check_alike(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  TORCH_CHECK(other.scalar_type() == x.scalar_type() && other.device() == x.device(), op, ": x is ", x.scalar_type(), " on ",
              x.device(), ", ", name, " is ", other.scalar_type(), " on ", other.device());
}

void check_row(const char* op, const Tensor& x, const char* name, const Tensor& row) {
  check_alike(op, x, name, row);
  TORCH_CHECK(x.dim() > 0 && row.dim() == 1 && row.size(0) == x.size(-1), op, ": x is ", x.sizes(), ", ", name, " is ", row.sizes());
}

void check_same(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  check_alike(op, x, name, other);
  TORCH_CHECK(other.sizes() == x.sizes(), op, ": x is ", x.sizes(), ", ", name, " is ", other.sizes());
}

int64_t rows_of(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

std::tuple<Tensor, Tensor> norm(const std::optional<Tensor>& residual, const Tensor& x_any, const Tensor& weight_any, double eps) {
  check_row("rms_norm", x_any, "weight", weight_any);
  if (residual) check_same("add_rms_norm", x_any, "residual", *residual);
  const Launch launch(x_any);
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous(), r = residual ? residual->contiguous() : Tensor();
  Tensor y = at::empty_like(x), total = residual ? at::empty_like(x) : Tensor();
  MINIVLM_BACKEND::rms_norm({.type = type_of(x), .rows = rows_of(x), .width = x.size(-1), .eps = eps, .x = x.const_data_ptr(),
                             .residual = residual ? r.const_data_ptr() : nullptr, .weight = weight.const_data_ptr(),
                             .y = y.data_ptr(), .total = residual ? total.data_ptr() : nullptr},
                            launch.stream());
  return {y, total};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) { return std::get<0>(norm(std::nullopt, x, weight, eps)); }

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  return norm(residual, x, weight, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_any, const std::optional<Tensor>& grad_total, const Tensor& x_any,
                                             const Tensor& weight_any, double eps) {
  check_row("rms_norm_backward", x_any, "weight", weight_any);
  check_same("rms_norm_backward", x_any, "grad", grad_any);
  if (grad_total) check_same("rms_norm_backward", x_any, "grad_total", *grad_total);
  const Launch launch(x_any);
  const Tensor grad = grad_any.contiguous(), x = x_any.contiguous(), weight = weight_any.contiguous();
  const Tensor extra = grad_total ? grad_total->contiguous() : Tensor();
  const int64_t rows = rows_of(x), width = x.size(-1), chunks = chunks_for(rows);
  Tensor grad_x = at::empty_like(x), grad_weight = empty_acc({chunks, width}, x), stats = empty_acc({rows}, x);
  MINIVLM_BACKEND::rms_norm_backward(
      {.type = type_of(x), .rows = rows, .width = width, .eps = eps, .grad = grad.const_data_ptr(),
       .grad_total = grad_total ? extra.const_data_ptr() : nullptr, .x = x.const_data_ptr(), .weight = weight.const_data_ptr(),
       .grad_x = grad_x.data_ptr(), .chunks = chunks, .grad_weight = grad_weight.data_ptr(), .stats = stats.data_ptr()},
      launch.stream());
  return {grad_x, grad_weight.sum(0).to(x.scalar_type())};
}

std::tuple<Tensor, Tensor> apply_rope(const Tensor& q_any, const Tensor& k_any, const Tensor& positions_any,
                                      const Tensor& inv_freq_any, at::OptionalIntArrayRef sections, double scale) {
  const char* op = "apply_rope";
  TORCH_CHECK(q_any.dim() == 4 && k_any.dim() == 4 && q_any.size(0) == k_any.size(0) && q_any.size(1) == k_any.size(1) &&
                  q_any.size(3) == k_any.size(3) && q_any.size(3) % 2 == 0,
              op, ": q is ", q_any.sizes(), ", k is ", k_any.sizes(), "; they must be (B, T, H, K) and (B, T, G, K)");
  check_alike(op, q_any, "k", k_any);
  const int64_t B = q_any.size(0), T = q_any.size(1), half = q_any.size(3) / 2;
  TORCH_CHECK(half <= Rope::max_half, op, ": heads of ", 2 * half, " channels; this kernel takes up to ", 2 * Rope::max_half);
  TORCH_CHECK(inv_freq_any.scalar_type() == at::kFloat && positions_any.scalar_type() == at::kLong &&
                  inv_freq_any.device() == q_any.device() && positions_any.device() == q_any.device(),
              op, ": inv_freq is ", inv_freq_any.scalar_type(), " on ", inv_freq_any.device(), ", positions ",
              positions_any.scalar_type(), " on ", positions_any.device(), "; they must be float32 and int64 on ", q_any.device());
  TORCH_CHECK(inv_freq_any.numel() == half, op, ": inv_freq has ", inv_freq_any.numel(), " entries, K/2 is ", half);
  const std::vector<int64_t> ends = sections ? sections->vec() : std::vector<int64_t>{half};
  TORCH_CHECK(ends.size() <= Rope::max_sections, op, ": ", ends.size(), " sections; this kernel takes up to ", Rope::max_sections);
  TORCH_CHECK(positions_any.numel() == int64_t(ends.size()) * B * T, op, ": positions are ", positions_any.sizes(), ", q is ",
              q_any.sizes(), ", sections ", ends.size());

  const Launch launch(q_any);
  // Strides are honoured, so that q and k may be slices of one projection; only a head's channels must lie side by side.
  const Tensor q = q_any.stride(3) == 1 ? q_any : q_any.contiguous(), k = k_any.stride(3) == 1 ? k_any : k_any.contiguous();
  const Tensor positions = positions_any.contiguous(), inv_freq = inv_freq_any.contiguous();
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  Rope a = {.type = type_of(q), .batch = B, .tokens = T, .q_heads = q.size(2), .k_heads = k.size(2), .half = half,
            .scale = float(scale), .q = q.const_data_ptr(), .k = k.const_data_ptr(),
            .q_strides = {q.stride(0), q.stride(1), q.stride(2)}, .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
            .positions = positions.const_data_ptr<int64_t>(), .inv_freq = inv_freq.const_data_ptr<float>(),
            .sections = int(ends.size()), .section_end = {}, .q_out = q_out.data_ptr(), .k_out = k_out.data_ptr()};
  int64_t end = 0;
  for (size_t i = 0; i < ends.size(); i++) {
    TORCH_CHECK(ends[i] >= 0, op, ": a section of ", ends[i], " pairs");
    a.section_end[i] = int(end += ends[i]);
  }
  TORCH_CHECK(end == half, op, ": sections add up to ", end, ", K/2 is ", half);
  MINIVLM_BACKEND::rope(a, launch.stream());
  return {q_out, k_out};
}

// The grids as int64 (pictures, 3) where the kernel runs, after a look at their values.
Tensor checked_grids(const Tensor& grid_thw, const Tensor& x, int64_t merge) {
  const char* op = "patch_merge";
  TORCH_CHECK(x.dim() == 2 && x.size(0) < int64_t(1) << 31, op, ": x is ", x.sizes(), "; it must be (P, C), P below 2^31");
  TORCH_CHECK(grid_thw.dim() == 2 && grid_thw.size(1) == 3 && grid_thw.scalar_type() == at::kLong, op, ": grid_thw is ",
              grid_thw.scalar_type(), " ", grid_thw.sizes(), "; it must be int64 (pictures, 3)");
  TORCH_CHECK(merge >= 1 && merge < 32768, op, ": merge is ", merge);
  const Tensor host = grid_thw.cpu().contiguous();
  const int64_t* grid = host.const_data_ptr<int64_t>();
  int64_t patches = 0;
  for (int64_t i = 0; i < host.size(0); i++, grid += 3) {
    const int64_t t = grid[0], h = grid[1], w = grid[2], most = x.size(0);
    TORCH_CHECK(t > 0 && h > 0 && w > 0 && h % merge == 0 && w % merge == 0, op, ": grid ", i, " is ", t, " x ", h, " x ", w,
                ", which ", merge, " x ", merge, " cells do not fill");
    const bool fits = t <= most && h <= most && w <= most && t * h <= most && t * h * w <= most;  // in this order: no overflow
    TORCH_CHECK(fits, op, ": grid ", i, " is ", t, " x ", h, " x ", w, ", x has ", most, " patches");
    patches += t * h * w;
  }
  TORCH_CHECK(patches == x.size(0), op, ": the grids hold ", patches, " patches, x has ", x.size(0));
  return grid_thw.to(x.device()).contiguous();
}

Tensor patch_merge(const Tensor& x_any, const Tensor& grid_thw, int64_t merge, const Tensor& weight_any, const Tensor& bias_any,
                   double eps) {
  check_row("patch_merge", x_any, "weight", weight_any);
  check_row("patch_merge", x_any, "bias", bias_any);
  const Launch launch(x_any);
  const Tensor grids = checked_grids(grid_thw, x_any, merge);
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous(), bias = bias_any.contiguous();
  const int64_t P = x.size(0), C = x.size(1), area = merge * merge;
  Tensor y = at::empty({P / area, area * C}, x.options());
  MINIVLM_BACKEND::patch_merge({.type = type_of(x), .patches = P, .width = C, .merge = merge, .eps = eps, .x = x.const_data_ptr(),
                                .grids = grids.const_data_ptr<int64_t>(), .weight = weight.const_data_ptr(),
                                .bias = bias.const_data_ptr(), .y = y.data_ptr()},
                               launch.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> patch_merge_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& grid_thw,
                                                        int64_t merge, const Tensor& weight_any, double eps) {
  check_row("patch_merge_backward", x_any, "weight", weight_any);
  check_alike("patch_merge_backward", x_any, "grad", grad_any);
  TORCH_CHECK(grad_any.numel() == x_any.numel(), "patch_merge_backward: x is ", x_any.sizes(), ", grad is ", grad_any.sizes());
  const Launch launch(x_any);
  const Tensor grids = checked_grids(grid_thw, x_any, merge);
  const Tensor grad = grad_any.contiguous(), x = x_any.contiguous(), weight = weight_any.contiguous();
  const int64_t P = x.size(0), C = x.size(1), chunks = chunks_for(P);
  Tensor grad_x = at::empty_like(x), grad_weight = empty_acc({chunks, C}, x), grad_bias = empty_acc({chunks, C}, x);
  Tensor stats = empty_acc({P, 2}, x), sources = at::empty({P}, grids.options());
  MINIVLM_BACKEND::patch_merge_backward(
      {.type = type_of(x), .patches = P, .width = C, .merge = merge, .eps = eps, .grad = grad.const_data_ptr(),
       .x = x.const_data_ptr(), .grids = grids.const_data_ptr<int64_t>(), .weight = weight.const_data_ptr(),
       .grad_x = grad_x.data_ptr(), .chunks = chunks, .grad_weight = grad_weight.data_ptr(), .grad_bias = grad_bias.data_ptr(),
       .stats = stats.data_ptr(), .sources = sources.data_ptr<int64_t>()},
      launch.stream());
  return {grad_x, grad_weight.sum(0).to(x.scalar_type()), grad_bias.sum(0).to(x.scalar_type())};
}

// Called by the including file's TORCH_LIBRARY_IMPL, which names the library and torch's dispatch key.
void implement_ops(torch::Library& m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("apply_rope", apply_rope);
  m.impl("patch_merge", patch_merge);
  m.impl("patch_merge_backward", patch_merge_backward);
}

}  // namespace
}  // namespace minivlm
