"""Which implementation an op runs: `reference` (torch), `cpu` (C++), `cuda`, or `emulated` (the CUDA sources on the CPU)."""

from collections.abc import Iterator
from contextlib import contextmanager

from minivlm.errors import MinivlmError

MODES = ("auto", "reference", "fused")
_mode = "auto"


def backends() -> list[str]:
    """Names of the backends that work on this machine; `reference` always does."""
    return ["reference"]


def set_backend(name: str) -> None:
    """Choose for the whole process: `auto`, `fused` (kernels or an error), or one of `backends()` by name."""
    global _mode
    if name not in ("auto", *backends()):
        raise MinivlmError(f"kernel backend {name!r} is not there; here are: auto, {', '.join(backends())}")
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
