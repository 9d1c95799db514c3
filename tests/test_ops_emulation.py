"""The emulation that runs CUDA kernels on a CPU: right where it emulates, loud where it does not."""

import shutil
import subprocess

import pytest

from minivlm.ops import build

PROGRAM = """
#include <cuda_runtime.h>

// Sums 64 numbers over two warps, each through shuffles, then both through shared memory.
__global__ void sum(const int* numbers, int* total) {
  __shared__ int of_warp[2];
  int value = numbers[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  total[blockIdx.x * blockDim.x + threadIdx.x] = of_warp[0] + 1000 * of_warp[1];
}

__global__ void partial_mask(int) { __shfl_xor_sync(0xffu, 1, 1); }
__global__ void shuffle(int) { __shfl_xor_sync(0xffffffffu, 1, 1); }
__global__ void some_wait(int) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void some_shuffle(int) {
  if (threadIdx.x < 31) __shfl_xor_sync(0xffffffffu, 1, 1);
}

int main(int, char** arguments) {
  switch (arguments[1][0]) {
    case 'a': emulate::launch(partial_mask, 1, 32, 0); break;
    case 'b': emulate::launch(shuffle, 1, 40, 0); break;
    case 'c': emulate::launch(some_wait, 1, 64, 0); break;
    case 'd': emulate::launch(some_shuffle, 1, 32, 0); break;
    case 'e': emulate::launch(shuffle, 1, 2048, 0); break;
    case 'f': emulate::launch(shuffle, 0, 32, 0); break;
  }
  int numbers[64], total[3 * 64];
  for (int i = 0; i < 64; i++) numbers[i] = i;
  emulate::launch(sum, 3, 64, static_cast<const int*>(numbers), static_cast<int*>(total));
  for (int i = 0; i < 3 * 64; i++)
    if (total[i] != 496 + 1000 * 1520) return 1;
  std::puts("right");
}
"""
NOT_EMULATED = {
    "atomics": ("__global__ void f(int* p) { atomicAdd(p, 1); }", "atomicAdd is not emulated"),
    "other shuffles": ("__global__ void f() { __shfl_down_sync(0xffffffffu, 1, 1); }", "not emulated"),
    "shared memory sized at launch": ("__global__ void f() { extern __shared__ float s[]; s[0] = 1; }", "error"),
    "launches in CUDA's own syntax": ("__global__ void f() {} void g() { f<<<1, 32>>>(); }", "error"),
}

pytestmark = pytest.mark.skipif(build.CSRC is None or build.compiler() is None, reason="no C++ compiler here")


def compile_emulated(source, *flags):
    command = [shutil.which(build.compiler()), "-std=c++17", f"-I{build.CSRC / 'emulate'}", *flags, "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "program"
    done = compile_emulated(PROGRAM, "-g", "-o", str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_shuffles_and_shared_memory_are_emulated(program):
    assert subprocess.run([program, "-"], capture_output=True, text=True, check=False).stdout == "right\n"


REFUSED = {
    "a": "partial mask",
    "b": "fewer than 32 threads",
    "c": "waits in __syncthreads, which other threads of its block never reach",
    "d": "waits in a shuffle, which other lanes of its warp never reach",
    "e": "1 to 1024 threads",
    "f": "1 to 2^31 - 1 blocks",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_emulated_stops_the_program_with_a_line(program, case):
    done = subprocess.run([program, case], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("emulate: block (") and REFUSED[case] in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", NOT_EMULATED)
def test_what_is_not_emulated_does_not_compile(name):
    source, message = NOT_EMULATED[name]
    done = compile_emulated("#include <cuda_runtime.h>\n" + source, "-fsyntax-only")
    assert done.returncode != 0 and message in done.stderr
