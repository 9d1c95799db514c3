// The kernels' whole interface: sizes and plain pointers. No torch here, so that every kernel compiles with a bare
// compiler and runs under a stand-alone driver; bindings.h joins them to torch. Each function exists twice, in `cpu`
// and in `cuda`.
//
// Letters as everywhere: B batch, T tokens, H query heads, G key/value heads, K head width. "Acc" is the type that sums
// are kept in: double for f64, float for everything else.
#pragma once
#include <cstdint>

namespace minivlm {

enum class Type { f32, f64, f16, bf16 };

struct RmsNorm {
  Type type;
  int64_t rows, width;
  double eps;
  const void* x;         // (rows, width)
  const void* residual;  // (rows, width), or null for the plain norm
  const void* weight;    // (width)
  void* y;               // (rows, width)
  void* total;           // (rows, width): residual + x; null without a residual
};

struct RmsNormBackward {
  Type type;
  int64_t rows, width;
  double eps;
  const void* grad;        // (rows, width): of y
  const void* grad_total;  // (rows, width): of `total`, added to grad_x; or null
  const void* x;           // (rows, width): what was normalised
  const void* weight;      // (width)
  void* grad_x;            // (rows, width)
  int64_t chunks;          // rows are summed chunk by chunk and the caller adds the chunks: no order depends on threads
  void* grad_weight;       // (chunks, width), Acc
  void* stats;             // (rows), Acc: scratch
};

struct Rope {
  static constexpr int max_sections = 8;
  static constexpr int max_half = 512;                       // K/2
  static constexpr int64_t max_position = int64_t(1) << 24;  // beyond it float32 skips integers
  Type type;
  int64_t batch, tokens, q_heads, k_heads, half;  // B, T, H, G, K/2
  float scale;
  const void *q, *k;                 // (B, T, H or G, K), the last stride 1
  int64_t q_strides[3];              // of B, T and head, in elements
  int64_t k_strides[3];
  const int64_t* positions;          // (sections, B, T)
  const float* inv_freq;             // (K/2)
  int sections;
  int section_end[max_sections];     // pairs below section_end[0] turn by row 0 of positions, and so on
  void *q_out, *k_out;               // (B, T, H or G, K), contiguous
};

struct PatchMerge {
  Type type;
  int64_t patches, width, merge;
  double eps;
  const void* x;         // (patches, width), raster order
  const int64_t* grids;  // (pictures, 3): frames, rows, columns
  const void *weight, *bias;
  void* y;  // (patches, width), merged order
};

struct PatchMergeBackward {
  Type type;
  int64_t patches, width, merge;
  double eps;
  const void* grad;  // (patches, width), merged order
  const void* x;     // (patches, width), raster order
  const int64_t* grids;
  const void* weight;
  void* grad_x;  // (patches, width), raster order
  int64_t chunks;
  void *grad_weight, *grad_bias;  // (chunks, width), Acc
  void* stats;                    // (patches, 2), Acc: scratch
  int64_t* sources;               // (patches): scratch
};

struct Patchify {
  Type type;                      // of table and y
  int64_t frames, height, width;  // of the film; a picture is a film of one frame
  int64_t depth, side;            // of a patch, in frames and pixels; side divides height and width
  int64_t patches;                // ceil(frames / depth) * height / side * width / side
  const uint8_t* pixels;          // (frames, height, width, 3)
  const void* table;              // (3, 256): what a byte becomes in each colour
  void* y;                        // (patches, 3 * depth * side * side)
};

namespace cpu {
void rms_norm(const RmsNorm&, void* stream = nullptr);  // a CPU has no streams: ignored
void rms_norm_backward(const RmsNormBackward&, void* stream = nullptr);
void rope(const Rope&, void* stream = nullptr);
void patch_merge(const PatchMerge&, void* stream = nullptr);
void patch_merge_backward(const PatchMergeBackward&, void* stream = nullptr);
void patchify(const Patchify&, void* stream = nullptr);
}  // namespace cpu

namespace cuda {
void rms_norm(const RmsNorm&, void* stream);  // a cudaStream_t
void rms_norm_backward(const RmsNormBackward&, void* stream);
void rope(const Rope&, void* stream);
void patch_merge(const PatchMerge&, void* stream);
void patch_merge_backward(const PatchMergeBackward&, void* stream);
void patchify(const Patchify&, void* stream);
}  // namespace cuda

}  // namespace minivlm
