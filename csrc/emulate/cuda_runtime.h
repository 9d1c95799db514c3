// CUDA on a CPU, as much of it as the kernels in ../cuda use: grid, block, shared memory, __syncthreads, warp shuffles.
//
// Put this folder first on the include path and compile a .cu file as C++ (g++ -x c++ -I csrc/emulate): the shipping
// kernel runs without a GPU, under a debugger, under sanitizers, in CI. Blocks run one after the other. Within a block
// every CUDA thread is a fiber, which runs until it waits at a barrier; a shuffle is a barrier of its warp. Hence what
// it cannot show: races between barriers, since threads never run at the same time, and speed.
//
// What is not here is refused: most of it does not compile, and a barrier that not all threads reach, a partial mask or
// a shuffle in an unfinished warp stop the program with a line that says so.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time: one copy will do. `extern __shared__` does not compile

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that is running

namespace emulate {

[[noreturn]] inline void refuse(const char* what) {
  const dim3 b = blockIdx, t = threadIdx;
  std::fprintf(stderr, "emulate: block (%u, %u, %u), thread (%u, %u, %u): %s\n", b.x, b.y, b.z, t.x, t.y, t.z, what);
  std::abort();
}

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  State state;
  unsigned shuffles;     // how many it has taken part in
  uint64_t offered[2];   // to the other lanes; two, because a fast lane may be one shuffle ahead
};

inline constexpr size_t stack_bytes = 64 * 1024, warp_size = 32;
inline std::vector<Thread> threads;  // of the block that is running; stacks are kept from launch to launch
inline Thread* current;
inline size_t block_size;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void run_body() {
  body();
  current->state = State::done;
}

inline void wait(State barrier) {
  current->state = barrier;
  swapcontext(&current->context, &scheduler);
}

// Lets the threads [begin, end) go on if all of them wait at `barrier`.
inline bool release(size_t begin, size_t end, State barrier) {
  const auto first = threads.begin() + begin, last = threads.begin() + end;
  if (!std::all_of(first, last, [=](const Thread& thread) { return thread.state == barrier; })) return false;
  std::for_each(first, last, [](Thread& thread) { thread.state = State::ready; });
  return true;
}

inline void prepare(Thread& thread, size_t i) {
  thread.state = State::ready;
  thread.shuffles = 0;
  thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = stack_bytes;
  thread.context.uc_link = &scheduler;  // where it goes when the kernel returns
  makecontext(&thread.context, run_body, 0);
}

inline void run_block() {
  for (size_t i = 0; i < block_size; i++) prepare(threads[i], i);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < block_size; i++) {
      if (threads[i].state != State::ready) continue;
      current = &threads[i];
      threadIdx = current->index;
      swapcontext(&scheduler, &current->context);
      moved = true;
    }
    for (size_t warp = 0; warp < block_size; warp += warp_size)
      moved |= release(warp, std::min(warp + warp_size, block_size), State::at_warp_barrier);
    moved |= release(0, block_size, State::at_block_barrier);
  }
  for (size_t i = 0; i < block_size; i++) {
    if (threads[i].state == State::done) continue;
    threadIdx = threads[i].index;
    const bool in_shuffle = threads[i].state == State::at_warp_barrier;
    refuse(in_shuffle ? "waits in a shuffle, which other lanes of its warp never reach"
                      : "waits in __syncthreads, which other threads of its block never reach");
  }
}

// kernel<<<grid, block>>>(arguments...), finished when it returns.
template <class Kernel, class... Arguments>
void launch(Kernel* kernel, dim3 grid, dim3 block, Arguments... arguments) {
  block_size = size_t(block.x) * block.y * block.z;
  if (block_size == 0 || block_size > 1024) refuse("a block has 1 to 1024 threads");
  if (size_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    refuse("a grid has 1 to 2^31 - 1 blocks along x, 1 to 65535 along y and z");
  while (threads.size() < block_size) {
    threads.emplace_back();
    threads.back().stack.reset(new char[stack_bytes]);
  }
  body = [=] { kernel(arguments...); };
  gridDim = grid, blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) run_block();
}

template <class... T>
inline constexpr bool never = false;

}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::State::at_block_barrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulate::Thread& thread = *emulate::current;
  const size_t self = &thread - emulate::threads.data(), other = self ^ size_t(lane_mask);
  if (mask != 0xffffffffu) emulate::refuse("shuffles with a partial mask are not emulated");
  if (lane_mask < 0 || lane_mask >= int(emulate::warp_size)) emulate::refuse("a shuffle stays within 32 lanes");
  if (self / emulate::warp_size * emulate::warp_size + emulate::warp_size > emulate::block_size)
    emulate::refuse("shuffles in a warp of fewer than 32 threads are not emulated");
  const unsigned slot = thread.shuffles++ % 2;
  std::memcpy(&thread.offered[slot], &value, sizeof value);
  emulate::wait(emulate::State::at_warp_barrier);
  std::memcpy(&value, &emulate::threads[other].offered[slot], sizeof value);
  return value;
}

// Named so that a kernel which reaches for them is told what to do, not only that a name is unknown.
#define MINIVLM_NOT_EMULATED(name, why)                                          \
  template <class... T>                                                          \
  int name(T...) {                                                               \
    static_assert(emulate::never<T...>, "emulate: " #name " is not emulated: " why); \
    return 0;                                                                    \
  }
MINIVLM_NOT_EMULATED(atomicAdd, "its order changes from run to run; sum in chunks instead")
MINIVLM_NOT_EMULATED(__shfl_sync, "add it beside __shfl_xor_sync")
MINIVLM_NOT_EMULATED(__shfl_up_sync, "add it beside __shfl_xor_sync")
MINIVLM_NOT_EMULATED(__shfl_down_sync, "add it beside __shfl_xor_sync")
MINIVLM_NOT_EMULATED(__ballot_sync, "add it beside __shfl_xor_sync")
MINIVLM_NOT_EMULATED(__cvta_generic_to_shared, "asynchronous copies have no counterpart here")
#undef MINIVLM_NOT_EMULATED
