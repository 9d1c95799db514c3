"""`python -m minivlm.ops`: what is here to build kernels with, which backend each op would use, and do they agree."""

import os
import platform
import subprocess
import sys
from functools import partial

import torch

from minivlm import ops
from minivlm.ops import backend, build


def main() -> int:
    print(f"python {platform.python_version()}, torch {torch.__version__}, its CUDA: {torch.version.cuda or 'none'}")
    print(f"C++ compiler     {_version(build.compiler()) or 'none: looked for $CXX, then c++'}")
    print(f"ninja            {_version(build.ninja()) or 'none: pip install ninja'}")
    print(f"nvcc             {_version(build.nvcc(), line=-2) or 'none'} (CUDA_HOME={os.environ.get('CUDA_HOME', '')})")
    print(f"GPU              {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print(f"architectures    {build.architectures() if build.with_cuda() else 'CUDA kernels are not compiled here'}")
    print(f"sources          {build.CSRC or 'not installed'}")
    for library in build.LIBRARIES:
        print(f"{library:<17}{_state(library)}")
    print(f"MINIVLM_KERNELS  {os.environ.get('MINIVLM_KERNELS', 'not set: auto')}")
    for kind in ("cpu", "cuda"):
        print(f"{kind + ' tensors':<17}{_used_for(kind)}")
    return _self_check()


def _version(program: str | None, line: int = 0) -> str | None:
    if program is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{program}: {said[line]}" if said else program


def _state(library: str) -> str:
    reason = backend.why_not(library)
    return f"not there: {reason}" if reason else str(build.find(library))


def _used_for(kind: str) -> str:
    """All ops of a library come together, so one answer holds for each of them."""
    names = "rms_norm, add_rms_norm, apply_rope, patch_merge, patchify"
    if kind == "cuda" and not torch.cuda.is_available():
        return "none on this machine"
    return f"{names}: {kind if kind in ops.backends() else 'reference'}"


def _self_check() -> int:
    """Every op on every backend against the reference, in bfloat16, on a shape of Qwen2-VL's."""
    failed = 0
    for name in ops.backends()[1:]:
        device = "cuda" if name == "cuda" else "cpu"
        draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
        x, weight, q, k = draw(64, 1280), draw(1280), draw(1, 64, 16, 80), draw(1, 64, 2, 80)
        positions = torch.arange(128, device=device).view(2, 1, 64)
        film = torch.randint(256, (3, 28, 56, 3), dtype=torch.uint8, device=device)
        calls = {
            "rms_norm": partial(ops.rms_norm, x, weight, 1e-6),
            "add_rms_norm": partial(ops.add_rms_norm, x, x, weight, 1e-6),
            "apply_rope": partial(ops.apply_rope, q, k, positions, torch.rand(40, device=device), [20, 20]),
            "patch_merge": partial(ops.patch_merge, x, torch.tensor([[1, 4, 8], [1, 8, 4]]), 2, weight, weight, 1e-6),
            "patchify": partial(ops.patchify, film, draw(3, 256), 2, 14),
        }
        for op, call in calls.items():
            with ops.use(name):
                ours = call()
            with ops.use("reference"):
                theirs = call()
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            off = max(((a.float() - b.float()).abs() / (1 + b.float().abs())).max().item() for a, b in pairs)
            failed += not off < 2**-6
            print(f"self-check       {name:<9} {op:<13} {'ok' if off < 2**-6 else f'WRONG by {off:.1e}'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
