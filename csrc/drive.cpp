// Drives the CPU kernels and the emulated CUDA kernels without torch: random and hostile shapes, every dtype, aligned
// and not, and compares the two with each other. Built with AddressSanitizer and UndefinedBehaviorSanitizer by `make
// sanitize`; every buffer is a heap block of exactly its size, so that one element too far is seen. Also the program to
// set breakpoints in: `make emulate`.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/parallel.h"
#include "patch_order.h"
#include "types.h"

void minivlm::cpu::parallel_for(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 1) body(0, count / 2);  // in two pieces, as two threads would have them
  if (count > 0) body(count > 1 ? count / 2 : 0, count);
}

namespace {

using namespace minivlm;

std::mt19937 generator(1);
int failures = 0;

int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

void expect(bool good, const char* what) {
  if (good) return;
  std::printf("FAILED: %s\n", what);
  failures++;
}

// A heap block of exactly `count` elements, or `shift` elements into one.
template <class T>
struct Buffer {
  std::unique_ptr<unsigned char[]> block;
  size_t count, shift;

  explicit Buffer(int64_t count, int64_t shift = 0) : count(count), shift(shift) {
    block.reset(new unsigned char[(count + shift) * sizeof(T)]);
    std::memset(block.get(), 0xff, (count + shift) * sizeof(T));  // NaN, so that what is left unwritten shows
  }
  T* data() { return reinterpret_cast<T*>(block.get()) + shift; }
  Buffer& randomise() {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < count; i++) narrow(Acc<T>(normal(generator)), data()[i]);
    return *this;
  }
};

template <class T>
constexpr double tolerance = sizeof(T) == 8 ? 1e-10 : sizeof(T) == 4 ? 1e-4 : std::is_same_v<T, float16> ? 4e-3 : 3e-2;

template <class T, class U>
void compare(Buffer<U>& ours, Buffer<U>& theirs, const char* what) {
  double worst = 0;
  for (size_t i = 0; i < ours.count; i++) {
    const double a = widen(ours.data()[i]), b = widen(theirs.data()[i]);
    const double difference = std::abs(a - b) / (1 + std::abs(b));
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  expect(worst <= tolerance<T>, what);
}

template <class T>
void drive_rms_norm(Type type) {
  const int64_t rows = pick({0, 1, 2, 5, 33}), width = pick({1, 2, 7, 8, 16, 31, 33, 80, 129, 512, 769, 2048});
  const int64_t shift = pick({0, 0, 1, 3}), chunks = pick({1, 2, 5}), n = rows * width;
  const bool with_residual = generator() % 2;
  auto buffer = [&](int64_t count) { return std::move(Buffer<T>(count, shift).randomise()); };
  Buffer<T> x = buffer(n), residual = buffer(n), weight = buffer(width), grad = buffer(n), grad_total = buffer(n);
  Buffer<T> y[] = {Buffer<T>(n, shift), Buffer<T>(n, shift)}, total[] = {Buffer<T>(n, shift), Buffer<T>(n, shift)};
  Buffer<T> grad_x[] = {Buffer<T>(n, shift), Buffer<T>(n, shift)};
  Buffer<Acc<T>> grad_weight[] = {Buffer<Acc<T>>(chunks * width), Buffer<Acc<T>>(chunks * width)}, stats(rows);
  for (int emulated : {0, 1}) {
    T *r = with_residual ? residual.data() : nullptr, *t = with_residual ? total[emulated].data() : nullptr;
    T* gt = with_residual ? grad_total.data() : nullptr;
    const RmsNorm forward = {type, rows, width, 1e-6, x.data(), r, weight.data(), y[emulated].data(), t};
    const RmsNormBackward backward = {type, rows, width, 1e-6, grad.data(), gt, x.data(), weight.data(),
                                      grad_x[emulated].data(), chunks, grad_weight[emulated].data(), stats.data()};
    emulated ? cuda::rms_norm(forward, nullptr) : cpu::rms_norm(forward);
    emulated ? cuda::rms_norm_backward(backward, nullptr) : cpu::rms_norm_backward(backward);
  }
  compare<T>(y[1], y[0], "rms_norm");
  if (with_residual) compare<T>(total[1], total[0], "rms_norm: residual + x");
  compare<T>(grad_x[1], grad_x[0], "rms_norm: gradient of x");
  compare<T>(grad_weight[1], grad_weight[0], "rms_norm: gradient of weight");
}

template <class T>
void drive_rope(Type type) {
  const int64_t B = pick({0, 1, 2}), tokens = pick({0, 1, 5}), H = pick({1, 3, 4}), G = pick({0, 1, 2});
  const int64_t half = pick({1, 3, 4, 8, 40, 64, 512}), K = 2 * half, shift = pick({0, 0, 1}), gap = pick({0, 0, 1, 8});
  const int sections = int(pick({1, 2, 3}));
  const int64_t q_row = H * K + gap, k_row = G * K + gap, N = B * tokens;  // a gap after each token's heads: strides
  Buffer<T> q(N * q_row, shift), k(N * k_row, shift);
  q.randomise(), k.randomise();
  Buffer<T> q_out[] = {Buffer<T>(N * H * K, shift), Buffer<T>(N * H * K, shift)};
  Buffer<T> k_out[] = {Buffer<T>(N * G * K), Buffer<T>(N * G * K)};
  Buffer<int64_t> positions(sections * N);
  for (size_t i = 0; i < positions.count; i++) positions.data()[i] = int64_t(generator() % 2000001) - 1000000;
  Buffer<float> inv_freq(half);
  for (int64_t j = 0; j < half; j++) inv_freq.data()[j] = std::pow(1e4f, -float(j) / half);
  for (int emulated : {0, 1}) {
    Rope a = {type, B, tokens, H, G, half, 1.5f, q.data(), k.data(), {tokens * q_row, q_row, K},
              {tokens * k_row, k_row, K}, positions.data(), inv_freq.data(), sections, {}, q_out[emulated].data(),
              k_out[emulated].data()};
    for (int i = 0; i < sections; i++) a.section_end[i] = int(half * (i + 1) / sections);  // the first may be empty
    emulated ? cuda::rope(a, nullptr) : cpu::rope(a);
  }
  compare<T>(q_out[1], q_out[0], "rope: q");
  compare<T>(k_out[1], k_out[0], "rope: k");
}

template <class T>
void drive_patch_merge(Type type) {
  const int64_t merge = pick({1, 2, 3}), C = pick({1, 5, 8, 80, 161, 1280});
  const int64_t shift = pick({0, 0, 1}), chunks = pick({1, 3});
  std::vector<int64_t> grids;
  int64_t P = 0;
  for (int64_t pictures = pick({0, 1, 3}); pictures > 0; pictures--) {
    const int64_t t = pick({1, 2}), h = merge * pick({1, 2, 3}), w = merge * pick({1, 2, 5});
    grids.insert(grids.end(), {t, h, w});
    P += t * h * w;
  }
  grids.shrink_to_fit();
  std::vector<bool> seen(P);
  for (int64_t slot = 0; slot < P; slot++) seen.at(source_patch(slot, grids.data(), merge)) = true;
  expect(std::find(seen.begin(), seen.end(), false) == seen.end(), "source_patch is a permutation");
  auto buffer = [&](int64_t count) { return std::move(Buffer<T>(count, shift).randomise()); };
  Buffer<T> x = buffer(P * C), weight = buffer(C), bias = buffer(C), grad = buffer(P * C);
  Buffer<T> y[] = {Buffer<T>(P * C, shift), Buffer<T>(P * C, shift)};
  Buffer<T> grad_x[] = {Buffer<T>(P * C, shift), Buffer<T>(P * C, shift)};
  Buffer<Acc<T>> grad_weight[] = {Buffer<Acc<T>>(chunks * C), Buffer<Acc<T>>(chunks * C)};
  Buffer<Acc<T>> grad_bias[] = {Buffer<Acc<T>>(chunks * C), Buffer<Acc<T>>(chunks * C)}, stats(2 * P);
  Buffer<int64_t> sources(P);
  for (int emulated : {0, 1}) {
    const double eps = 1e-2;  // rows of one element have no variance; with a tiny eps their gradient would be noise
    const PatchMerge forward = {type, P, C, merge, eps, x.data(), grids.data(), weight.data(), bias.data(),
                                y[emulated].data()};
    const PatchMergeBackward backward = {type, P, C, merge, eps, grad.data(), x.data(), grids.data(), weight.data(),
                                         grad_x[emulated].data(), chunks, grad_weight[emulated].data(),
                                         grad_bias[emulated].data(), stats.data(), sources.data()};
    emulated ? cuda::patch_merge(forward, nullptr) : cpu::patch_merge(forward);
    emulated ? cuda::patch_merge_backward(backward, nullptr) : cpu::patch_merge_backward(backward);
  }
  compare<T>(y[1], y[0], "patch_merge");
  compare<T>(grad_x[1], grad_x[0], "patch_merge: gradient of x");
  compare<T>(grad_weight[1], grad_weight[0], "patch_merge: gradient of weight");
  compare<T>(grad_bias[1], grad_bias[0], "patch_merge: gradient of bias");
}

template <class T>
void drive_patchify(Type type) {
  const int64_t frames = pick({0, 1, 2, 3}), depth = pick({1, 2, 3}), side = pick({1, 2, 5, 14});
  const int64_t rows = pick({0, 1, 2, 5}), columns = pick({1, 2, 5}), shift = pick({0, 0, 1, 3});
  const int64_t height = rows * side, width = columns * side, P = (frames + depth - 1) / depth * rows * columns;
  Buffer<uint8_t> pixels(frames * height * width * 3, shift);
  for (size_t i = 0; i < pixels.count; i++) pixels.data()[i] = uint8_t(generator());
  Buffer<T> table(3 * 256, shift), y[] = {Buffer<T>(P * 3 * depth * side * side), Buffer<T>(P * 3 * depth * side * side)};
  table.randomise();
  for (int emulated : {0, 1}) {
    const Patchify a = {type, frames, height, width, depth, side, P, pixels.data(), table.data(), y[emulated].data()};
    emulated ? cuda::patchify(a, nullptr) : cpu::patchify(a);
  }
  expect(std::memcmp(y[0].data(), y[1].data(), y[0].count * sizeof(T)) == 0, "patchify, to the last bit");
  compare<T>(y[1], y[0], "patchify leaves nothing unwritten");
}

uint16_t half_of(float value) {
  float16 half;
  narrow(value, half);
  return half.bits;
}

// All halves survive the way to float and back, and what lies between two of them goes to the nearer, ties to even.
void check_float16() {
  for (int bits = 0; bits < 0x7c00; bits++) {
    const float low = widen(float16{uint16_t(bits)});
    const float high = bits == 0x7bff ? 65536 : widen(float16{uint16_t(bits + 1)});
    const float middle = (low + high) / 2, below = std::nextafter(middle, 0.f), above = std::nextafter(middle, 1e9f);
    expect(half_of(low) == bits && half_of(-low) == (bits | 0x8000), "float16 comes back");
    expect(half_of(below) == bits && half_of(above) == bits + 1, "float16 goes to the nearer");
    expect(half_of(middle) == bits + bits % 2, "float16 breaks ties to even");
  }
  expect(half_of(INFINITY) == 0x7c00 && half_of(-1e9f) == 0xfc00, "float16 has infinities");
  expect(std::isnan(rounded<float16>(NAN)) && std::isnan(rounded<bfloat16>(NAN)), "NaN stays NaN");
  expect(std::isinf(rounded<bfloat16>(3.4e38f)), "bfloat16 overflows to infinity");
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 200;
  check_float16();
  for (int round = 0; round < rounds; round++) {
    const Type type = Type(round % 4);
    by_type<float16, bfloat16>(type, [&](auto zero) {
      drive_rms_norm<decltype(zero)>(type);
      drive_rope<decltype(zero)>(type);
      drive_patch_merge<decltype(zero)>(type);
      drive_patchify<decltype(zero)>(type);
    });
  }
  std::printf("%d rounds, %d failures\n", rounds, failures);
  return failures > 0;
}
