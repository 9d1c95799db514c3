// Joins the kernels to torch: checks what would be unsafe, allocates, launches. Included by one bindings_*.cpp per
// backend, which has defined before: MINIVLM_BACKEND, the namespace of its kernels; and `Launch`, made from a tensor,
// which holds what a launch there needs and gives the stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

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
    default: TORCH_CHECK(false, "minivlm: no kernel for ", x.scalar_type(), "; use a floating dtype");
  }
}

Tensor empty_acc(at::IntArrayRef shape, const Tensor& like) {  // of the type that sums over `like` are kept in
  return at::empty(shape, like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional(x->contiguous()) : std::nullopt;
}

// Row sums in pieces, to be added afterwards: enough to keep a machine busy, and a number that depends on nothing but
// rows.
int64_t chunks_for(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 256); }

int64_t rows_of(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

void check_alike(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  TORCH_CHECK(other.scalar_type() == x.scalar_type() && other.device() == x.device(), op, ": x is ", x.scalar_type(),
              " on ", x.device(), ", ", name, " is ", other.scalar_type(), " on ", other.device());
}

void check_row(const char* op, const Tensor& x, const char* name, const Tensor& row) {
  check_alike(op, x, name, row);
  TORCH_CHECK(x.dim() > 0 && row.dim() == 1 && row.size(0) == x.size(-1), op, ": x is ", x.sizes(), ", ", name, " is ",
              row.sizes());
}

void check_same(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  check_alike(op, x, name, other);
  TORCH_CHECK(other.sizes() == x.sizes(), op, ": x is ", x.sizes(), ", ", name, " is ", other.sizes());
}

std::tuple<Tensor, Tensor> norm(const std::optional<Tensor>& any_residual, const Tensor& any_x,
                                const Tensor& any_weight, double eps) {
  check_row("rms_norm", any_x, "weight", any_weight);
  if (any_residual) check_same("add_rms_norm", any_x, "residual", *any_residual);
  const Launch launch(any_x);
  const Tensor x = any_x.contiguous(), weight = any_weight.contiguous();
  const std::optional<Tensor> residual = contiguous(any_residual);
  Tensor y = at::empty_like(x), total = residual ? at::empty_like(x) : Tensor();
  MINIVLM_BACKEND::rms_norm({.type = type_of(x),
                             .rows = rows_of(x),
                             .width = x.size(-1),
                             .eps = eps,
                             .x = x.const_data_ptr(),
                             .residual = data_or_null(residual),
                             .weight = weight.const_data_ptr(),
                             .y = y.data_ptr(),
                             .total = residual ? total.data_ptr() : nullptr},
                            launch.stream());
  return {y, total};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return std::get<0>(norm(std::nullopt, x, weight, eps));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  return norm(residual, x, weight, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& any_grad, const std::optional<Tensor>& any_grad_total,
                                             const Tensor& any_x, const Tensor& any_weight, double eps) {
  const char* op = "rms_norm_backward";
  check_row(op, any_x, "weight", any_weight);
  check_same(op, any_x, "grad", any_grad);
  if (any_grad_total) check_same(op, any_x, "grad_total", *any_grad_total);
  const Launch launch(any_x);
  const Tensor grad = any_grad.contiguous(), x = any_x.contiguous(), weight = any_weight.contiguous();
  const std::optional<Tensor> grad_total = contiguous(any_grad_total);
  const int64_t rows = rows_of(x), width = x.size(-1), chunks = chunks_for(rows);
  Tensor grad_x = at::empty_like(x), grad_weight = empty_acc({chunks, width}, x), stats = empty_acc({rows}, x);
  MINIVLM_BACKEND::rms_norm_backward({.type = type_of(x),
                                      .rows = rows,
                                      .width = width,
                                      .eps = eps,
                                      .grad = grad.const_data_ptr(),
                                      .grad_total = data_or_null(grad_total),
                                      .x = x.const_data_ptr(),
                                      .weight = weight.const_data_ptr(),
                                      .grad_x = grad_x.data_ptr(),
                                      .chunks = chunks,
                                      .grad_weight = grad_weight.data_ptr(),
                                      .stats = stats.data_ptr()},
                                     launch.stream());
  return {grad_x, grad_weight.sum(0).to(x.scalar_type())};
}

void check_rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq,
                const std::vector<int64_t>& sections) {
  const char* op = "apply_rope";
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4, op, ": q is ", q.sizes(), ", k is ", k.sizes(), "; both have 4 dimensions");
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3), op, ": q is ", q.sizes(),
              ", k is ", k.sizes(), "; they must be (B, T, H, K) and (B, T, G, K)");
  check_alike(op, q, "k", k);
  const int64_t half = q.size(3) / 2, most = 2 * Rope::max_half;
  TORCH_CHECK(q.size(3) % 2 == 0 && q.size(3) <= most, op, ": heads of ", q.size(3), " channels; even, up to ", most);
  TORCH_CHECK(inv_freq.scalar_type() == at::kFloat && positions.scalar_type() == at::kLong, op, ": inv_freq is ",
              inv_freq.scalar_type(), ", positions are ", positions.scalar_type(), "; they must be float32 and int64");
  TORCH_CHECK(inv_freq.device() == q.device() && positions.device() == q.device(), op, ": q is on ", q.device(),
              ", inv_freq on ", inv_freq.device(), ", positions on ", positions.device());
  TORCH_CHECK(inv_freq.numel() == half, op, ": inv_freq has ", inv_freq.numel(), " entries, K/2 is ", half);
  TORCH_CHECK(sections.size() <= Rope::max_sections, op, ": ", sections.size(), " sections, more than ",
              Rope::max_sections);
  TORCH_CHECK(positions.numel() == int64_t(sections.size()) * q.size(0) * q.size(1), op, ": positions are ",
              positions.sizes(), ", q is ", q.sizes(), ", sections ", sections.size());
  int64_t sum = 0;
  for (const int64_t pairs : sections) {
    TORCH_CHECK(pairs >= 0 && pairs <= half, op, ": a section of ", pairs, " pairs, K/2 is ", half);
    sum += pairs;
  }
  TORCH_CHECK(sum == half, op, ": sections add up to ", sum, ", K/2 is ", half);
}

std::tuple<Tensor, Tensor> apply_rope(const Tensor& any_q, const Tensor& any_k, const Tensor& any_positions,
                                      const Tensor& any_inv_freq, at::OptionalIntArrayRef sections, double scale) {
  const std::vector<int64_t> pairs = sections ? sections->vec() : std::vector<int64_t>{any_inv_freq.numel()};
  check_rope(any_q, any_k, any_positions, any_inv_freq, pairs);
  const Launch launch(any_q);
  // Strides are honoured, so that q and k may be slices of one projection; only a head's channels must lie side by
  // side.
  const Tensor q = any_q.stride(3) == 1 ? any_q : any_q.contiguous();
  const Tensor k = any_k.stride(3) == 1 ? any_k : any_k.contiguous();
  const Tensor positions = any_positions.contiguous(), inv_freq = any_inv_freq.contiguous();
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  Rope a = {.type = type_of(q),
            .batch = q.size(0),
            .tokens = q.size(1),
            .q_heads = q.size(2),
            .k_heads = k.size(2),
            .half = q.size(3) / 2,
            .scale = float(scale),
            .q = q.const_data_ptr(),
            .k = k.const_data_ptr(),
            .q_strides = {q.stride(0), q.stride(1), q.stride(2)},
            .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
            .positions = positions.const_data_ptr<int64_t>(),
            .inv_freq = inv_freq.const_data_ptr<float>(),
            .sections = int(pairs.size()),
            .section_end = {},
            .q_out = q_out.data_ptr(),
            .k_out = k_out.data_ptr()};
  for (int i = 0, end = 0; i < a.sections; i++) a.section_end[i] = end += int(pairs[i]);
  MINIVLM_BACKEND::rope(a, launch.stream());
  return {q_out, k_out};
}

// The grids as int64 (pictures, 3) where the kernel runs, after a look at their values.
Tensor checked_grids(const Tensor& grid_thw, const Tensor& x, int64_t merge) {
  const char* op = "patch_merge";
  TORCH_CHECK(x.dim() == 2 && x.size(0) < int64_t(1) << 31, op, ": x is ", x.sizes(), "; it must be (P, C), P < 2^31");
  TORCH_CHECK(grid_thw.dim() == 2 && grid_thw.size(1) == 3 && grid_thw.scalar_type() == at::kLong, op, ": grid_thw is ",
              grid_thw.scalar_type(), " ", grid_thw.sizes(), "; it must be int64 (pictures, 3)");
  TORCH_CHECK(merge >= 1 && merge < 32768, op, ": merge is ", merge);
  const Tensor host = grid_thw.cpu().contiguous();
  const int64_t *grid = host.const_data_ptr<int64_t>(), most = x.size(0);
  int64_t patches = 0;
  for (int64_t i = 0; i < host.size(0); i++, grid += 3) {
    const int64_t t = grid[0], h = grid[1], w = grid[2];
    const bool cells = t > 0 && h > 0 && w > 0 && h % merge == 0 && w % merge == 0;
    TORCH_CHECK(cells, op, ": grid ", i, ", ", t, " x ", h, " x ", w, ", has no whole ", merge, " x ", merge, " cells");
    const bool fits = t <= most && h <= most && w <= most && t * h <= most && t * h * w <= most;  // none overflows
    TORCH_CHECK(fits, op, ": grid ", i, " is ", t, " x ", h, " x ", w, ", x has ", most, " patches");
    patches += t * h * w;
  }
  TORCH_CHECK(patches == most, op, ": the grids hold ", patches, " patches, x has ", most);
  return grid_thw.to(x.device()).contiguous();
}

Tensor patch_merge(const Tensor& any_x, const Tensor& grid_thw, int64_t merge, const Tensor& any_weight,
                   const Tensor& any_bias, double eps) {
  check_row("patch_merge", any_x, "weight", any_weight);
  check_row("patch_merge", any_x, "bias", any_bias);
  const Launch launch(any_x);
  const Tensor grids = checked_grids(grid_thw, any_x, merge);
  const Tensor x = any_x.contiguous(), weight = any_weight.contiguous(), bias = any_bias.contiguous();
  const int64_t P = x.size(0), C = x.size(1), area = merge * merge;
  Tensor y = at::empty({P / area, area * C}, x.options());
  MINIVLM_BACKEND::patch_merge({.type = type_of(x),
                                .patches = P,
                                .width = C,
                                .merge = merge,
                                .eps = eps,
                                .x = x.const_data_ptr(),
                                .grids = grids.const_data_ptr<int64_t>(),
                                .weight = weight.const_data_ptr(),
                                .bias = bias.const_data_ptr(),
                                .y = y.data_ptr()},
                               launch.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> patch_merge_backward(const Tensor& any_grad, const Tensor& any_x,
                                                        const Tensor& grid_thw, int64_t merge, const Tensor& any_weight,
                                                        double eps) {
  const char* op = "patch_merge_backward";
  check_row(op, any_x, "weight", any_weight);
  check_alike(op, any_x, "grad", any_grad);
  TORCH_CHECK(any_grad.numel() == any_x.numel(), op, ": x is ", any_x.sizes(), ", grad is ", any_grad.sizes());
  const Launch launch(any_x);
  const Tensor grids = checked_grids(grid_thw, any_x, merge);
  const Tensor grad = any_grad.contiguous(), x = any_x.contiguous(), weight = any_weight.contiguous();
  const int64_t P = x.size(0), C = x.size(1), chunks = chunks_for(P);
  Tensor grad_x = at::empty_like(x), grad_weight = empty_acc({chunks, C}, x), grad_bias = empty_acc({chunks, C}, x);
  Tensor stats = empty_acc({P, 2}, x), sources = at::empty({P}, grids.options());
  MINIVLM_BACKEND::patch_merge_backward({.type = type_of(x),
                                         .patches = P,
                                         .width = C,
                                         .merge = merge,
                                         .eps = eps,
                                         .grad = grad.const_data_ptr(),
                                         .x = x.const_data_ptr(),
                                         .grids = grids.const_data_ptr<int64_t>(),
                                         .weight = weight.const_data_ptr(),
                                         .grad_x = grad_x.data_ptr(),
                                         .chunks = chunks,
                                         .grad_weight = grad_weight.data_ptr(),
                                         .grad_bias = grad_bias.data_ptr(),
                                         .stats = stats.data_ptr(),
                                         .sources = sources.data_ptr<int64_t>()},
                                        launch.stream());
  return {grad_x, grad_weight.sum(0).to(x.scalar_type()), grad_bias.sum(0).to(x.scalar_type())};
}

void check_patchify(const Tensor& pixels, const Tensor& table, int64_t depth, int64_t side) {
  const char* op = "patchify";
  TORCH_CHECK(pixels.dim() == 4 && pixels.size(3) == 3 && pixels.scalar_type() == at::kByte, op, ": pixels are ",
              pixels.scalar_type(), " ", pixels.sizes(), "; they must be uint8 (frames, height, width, 3)");
  TORCH_CHECK(table.dim() == 2 && table.size(0) == 3 && table.size(1) == 256 && table.device() == pixels.device(), op,
              ": table is ", table.sizes(), " on ", table.device(), "; it must be (3, 256) on ", pixels.device());
  const bool fits = depth >= 1 && side >= 1 && depth < 32768 && side < 32768 && 3 * depth * side * side < 1 << 30;
  TORCH_CHECK(fits, op, ": a patch of ", depth, " frames of ", side, " x ", side, " pixels");
  TORCH_CHECK(pixels.size(1) % side == 0 && pixels.size(2) % side == 0, op, ": ", pixels.size(1), " x ",
              pixels.size(2), " pixels are no whole patches of ", side, " x ", side);
}

Tensor patchify(const Tensor& any_pixels, const Tensor& any_table, int64_t depth, int64_t side) {
  check_patchify(any_pixels, any_table, depth, side);
  const Launch launch(any_pixels);
  const Tensor pixels = any_pixels.contiguous(), table = any_table.contiguous();
  const int64_t frames = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  const int64_t P = (frames + depth - 1) / depth * (height / side) * (width / side);
  Tensor y = at::empty({P, 3 * depth * side * side}, table.options());
  MINIVLM_BACKEND::patchify({.type = type_of(table),
                             .frames = frames,
                             .height = height,
                             .width = width,
                             .depth = depth,
                             .side = side,
                             .patches = P,
                             .pixels = pixels.const_data_ptr<uint8_t>(),
                             .table = table.const_data_ptr(),
                             .y = y.data_ptr()},
                            launch.stream());
  return y;
}

// Called by the including file's TORCH_LIBRARY_IMPL, which names the library and torch's dispatch key.
void implement_ops(torch::Library& m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("apply_rope", apply_rope);
  m.impl("patch_merge", patch_merge);
  m.impl("patch_merge_backward", patch_merge_backward);
  m.impl("patchify", patchify);
}

}  // namespace
}  // namespace minivlm
