"""Each op against eager torch, torch.compile and the machine's own copy, as ratios.

Times drift by a factor of two on a shared machine, so the rivals take turns, and medians over the rounds are printed.
With OMP_NUM_THREADS=1 it is the thread's own time that is taken, which leaves out what other programs take from it.
"share" is the speed at which an op moves memory (every input read once, every output written once) as a part of the
speed at which the machine copies as many bytes in the same round.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch.nn import functional as F

from minivlm import ops
from minivlm.ops.patch_merge import patch_merge_reference
from minivlm.ops.patchify import patchify_reference
from minivlm.ops.rms_norm import add_rms_norm_reference, rms_norm_reference
from minivlm.ops.rope import apply_rope_reference

RIVALS = ("eager", "F.", "compile")


def cases(T, dtype, device):
    """(name, shape, ours, eager, bytes moved) at the sizes of Qwen2-VL-2B and -7B and of their vision tower."""
    draw = partial(torch.randn, dtype=dtype, device=device)
    for D in (1536, 3584):
        x, residual, weight = draw(1, T, D), draw(1, T, D), draw(D)
        yield "rms_norm", f"{T} x {D}", ops.rms_norm, rms_norm_reference, (x, weight, 1e-6), 2 * size(x)
        arguments = (residual, x, weight, 1e-6)
        yield "add_rms_norm", f"{T} x {D}", ops.add_rms_norm, add_rms_norm_reference, arguments, 4 * size(x)
    for H, G, K, sections in ((12, 2, 128, [16, 24, 24]), (28, 4, 128, [16, 24, 24]), (16, 16, 80, [20, 20])):
        q, k, inv_freq = draw(1, T, H, K), draw(1, T, G, K), torch.rand(K // 2, device=device)
        positions = torch.arange(T, device=device).expand(len(sections), 1, T).contiguous()
        arguments = (q, k, positions, inv_freq, sections)
        moved = 2 * size(q) + 2 * size(k)
        yield "apply_rope", f"{T} x {H}+{G} x {K}", ops.apply_rope, apply_rope_reference, arguments, moved
    if T % 8 == 0:  # cells of 2 x 2 patches in two grids
        x, weight, bias = draw(T, 1280), draw(1280), draw(1280)
        grids = torch.tensor([[1, 2, T // 4], [1, T // 4, 2]])
        arguments = (x, grids, 2, weight, bias, 1e-6)
        yield "patch_merge", f"{T} x 1280", ops.patch_merge, patch_merge_reference, arguments, 2 * size(x)
        rows = 1 << (T.bit_length() - 1) // 2
        height, width = 14 * rows, 14 * (T // rows)
        pixels = torch.randint(256, (1, height, width, 3), dtype=torch.uint8, device=device)
        arguments, moved = (pixels, draw(3, 256), 2, 14), size(pixels) * (1 + 2 * dtype.itemsize)
        yield "patchify", f"{height} x {width}", ops.patchify, patchify_reference, arguments, moved


def size(x):
    return x.numel() * x.element_size()


def seconds(call, repeat, device):
    """Mean time of `repeat` calls, after one more: caches and heap are as this call leaves them, not its rival."""
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for _ in range(repeat):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / repeat


def measure(ours, rivals, device, rounds):
    """Median time of ours, and each rival's median ratio to it, round by round."""
    calls = [ours, *rivals]
    for call in calls:
        call(), call()
    repeat = max(1, int(0.01 / max(seconds(ours, 3, device), 1e-6)))
    times = [[seconds(call, repeat, device) for call in calls] for _ in range(rounds)]
    ratios = [statistics.median(row[i] / row[0] for row in times) for i in range(1, len(calls))]
    return statistics.median(row[0] for row in times), ratios


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 512, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="race torch.compile, too")
    options = parser.parse_args()
    device = options.device
    print(f"{device}, {torch.get_num_threads()} threads; ratios: above 1, ours is faster")
    print(f"{'op':<13}{'dtype':<10}{'shape':<19}{'ours':>9}" + "".join(f"{rival:>8}" for rival in RIVALS) + "   share")
    for dtype in (torch.bfloat16, torch.float32):
        for T in options.tokens:
            for name, shape, op, reference, arguments, moved in cases(T, dtype, device):
                source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
                rivals = {
                    "copy": partial(torch.empty_like(source).copy_, source),
                    "eager": partial(reference, *arguments),
                }
                if name == "rms_norm":  # the only one of them that torch has as a function
                    x, weight, eps = arguments
                    rivals["F."] = partial(F.rms_norm, x, weight.shape, weight, eps)
                if options.compile and T > 1:
                    torch.compiler.reset()
                    rivals["compile"] = partial(torch.compile(reference), *arguments)
                ours, ratios = measure(partial(op, *arguments), rivals.values(), device, options.rounds)
                ratio = dict(zip(rivals, ratios, strict=True))
                columns = "".join(f"{ratio[rival]:>8.1f}" if rival in ratio else " " * 8 for rival in RIVALS)
                print(f"{name:<13}{str(dtype)[6:]:<10}{shape:<19}{ours * 1e6:>6.0f} us{columns}{ratio['copy']:>8.0%}")


if __name__ == "__main__":
    main()
