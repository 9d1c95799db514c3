"""Which implementation an op runs: `reference` (torch), `cpu` (C++), `cuda`, or `emulated` (CUDA sources on the CPU).

The choice is made once per device and kept, because decoding asks for it some sixty times a token. Nothing is compiled
at import; the first op that could use a kernel triggers it. `MINIVLM_KERNELS=reference` in the environment keeps
everything on torch.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minivlm.errors import MinivlmError
from minivlm.ops import build

NAMES = ("reference", "cpu", "emulated", "cuda")
MODES = ("auto", "fused", *NAMES)

_mode = os.environ.get("MINIVLM_KERNELS", "auto")
_chosen: dict[tuple[str, str], str] = {}  # (mode, device type) → library, or "reference"
_missing: dict[str, str | None] = {}  # library → why it is not there, or None if it is loaded
_registrations: list[Callable[[str], None]] = []


def set_backend(name: str) -> None:
    """Choose for the whole process.

    `auto`: kernels where they can be had, else the reference, with one line on stderr. `fused`: kernels of the tensor's
    device, or an error. Or a backend by name; one that is not there is an error, never a silent fallback.
    """
    global _mode
    if name not in MODES:
        raise MinivlmError(f"there is no kernel backend {name!r}; choose one of {', '.join(MODES)}")
    library = {"fused": "minivlm", "cpu": "minivlm", "cuda": "minivlm", "emulated": "minivlm_emulated"}.get(name)
    if library and why_not(library):
        raise MinivlmError(f"the {name} kernels are not there: {why_not(library)}; `auto` falls back on torch")
    if name == "cuda" and not _has_cuda_kernels():
        raise MinivlmError("the cuda kernels are not there: they need a torch with CUDA, nvcc and a GPU")
    _mode = name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose for one `with` block; the argument is `set_backend`'s."""
    before = _mode
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backends() -> list[str]:
    """What works on this machine, compiled now if it was not yet."""
    there = {
        "reference": True,
        "cpu": why_not("minivlm") is None,
        "emulated": why_not("minivlm_emulated") is None,
        "cuda": _has_cuda_kernels(),
    }
    return [name for name in NAMES if there[name]]


def why_not(library: str) -> str | None:
    """Load a library if need be; None if it is there, else the reason."""
    if library not in _missing:
        try:
            build.load(library)
            for register in _registrations:
                register(library)
            _missing[library] = None
        except build.Unavailable as reason:
            _missing[library] = str(reason)
    return _missing[library]


def on_load(register: Callable[[str], None]) -> Callable[[str], None]:
    """Decorator: `register(library)` teaches torch shapes and gradients of a library's ops once it is loaded."""
    _registrations.append(register)
    return register


def check_devices(op: str, names: str, *tensors: Tensor) -> None:
    """Raise unless all are on one device. A kernel would take a tensor without data, on `meta`, and return garbage."""
    if len({tensor.device for tensor in tensors}) > 1:
        places = ", ".join(f"{name} is on {tensor.device}" for name, tensor in zip(names.split(), tensors, strict=True))
        raise MinivlmError(f"{op}: {places}; move them to one device")


def kernels_for(x: Tensor):
    """The namespace of ops that serve tensors like `x`, or None: use the reference."""
    key = _mode, x.device.type
    library = _chosen.get(key)
    if library is None:
        library = _chosen[key] = _choose(*key)
    return None if library == "reference" else getattr(torch.ops, library)


def _choose(mode: str, kind: str) -> str:
    """What serves tensors on devices of this kind: `minivlm`, `minivlm_emulated`, or `reference`."""
    if kind == "meta" or mode == "reference":
        return "reference"
    if mode not in MODES:
        raise MinivlmError(f"MINIVLM_KERNELS is {mode!r}; choose one of {', '.join(MODES)}")
    served = {"cpu": ("cpu",), "emulated": ("cpu",), "cuda": ("cuda",)}.get(mode, ("cpu", "cuda"))
    library = "minivlm_emulated" if mode == "emulated" else "minivlm"
    reason = why_not(library) if kind in served else f"tensors are on {kind}"
    if reason is None and kind == "cuda" and not _has_cuda_kernels():
        reason = "the library was built without CUDA (torch with CUDA and nvcc are needed)"
    if reason is None:
        return library
    if mode != "auto":
        raise MinivlmError(f"kernels {mode!r} were asked for, but {reason}")
    if kind in ("cpu", "cuda"):
        print(f"minivlm: running on torch's own operations, {reason}", file=sys.stderr)
    return "reference"


# torch.compile calls this while it traces and takes the answer for constant: what torch.compiler.assume_constant_result
# does, without the second that importing the compiler takes.
_choose._dynamo_marked_constant = True


def _has_cuda_kernels() -> bool:
    if not torch.cuda.is_available() or why_not("minivlm"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("minivlm::rms_norm", "CUDA")
