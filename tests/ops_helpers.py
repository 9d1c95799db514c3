"""What the op tests share: the backends, odd shapes and strides, and the tolerance of each dtype."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st

from minivlm import ops
from minivlm.ops.backend import why_not

BACKENDS = ("reference", "cpu", "emulated", "cuda")
backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.cuda) if name == "cuda" else name for name in BACKENDS]
)
kernels = pytest.mark.parametrize("backend", backends.args[1][1:])

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
WIDTHS = st.sampled_from([1, 7, 8, 64, 80, 769, 1024, 1536, 5125, 8192])
LAYOUTS = st.sampled_from(["plain", "unaligned", "strided", "transposed"])
SEEDS = st.integers(0, 99)

# A few roundings at 1. Kernels add in another order than torch does, so a result may land on the neighbour.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@contextmanager
def on(backend):
    """Run the ops on this backend, and make tensors on its device."""
    if backend != "reference":
        reason = why_not("minivlm_emulated" if backend == "emulated" else "minivlm")  # compiles, the first time
        if reason or (backend == "cuda" and "cuda" not in ops.backends()):
            pytest.skip(reason or "torch has CUDA, but nvcc is missing")
    with ops.use(backend), torch.device("cuda" if backend == "cuda" else "cpu"):
        yield


def library(backend):
    return torch.ops.minivlm_emulated if backend == "emulated" else torch.ops.minivlm


def randn(*shape, dtype=torch.float32, seed=0):
    """Normal numbers, the same on every device and in every dtype."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return values.to(dtype=dtype, device=torch.get_default_device())


def laid_out(x, layout):
    """The same values, elsewhere in memory."""
    if layout == "unaligned":  # one element into a buffer, where 16-byte accesses are not allowed
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    if layout == "strided":  # every second element of something wider
        return torch.stack((x, torch.full_like(x, float("nan") if x.is_floating_point() else 99)), -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def close(ours, theirs, factor=1.0):
    """Equal up to the dtype's tolerance, relative to each value or to `factor`, whichever is larger."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(factor))


def grads(function, inputs):
    """The gradients of a fixed weighted sum of all outputs; each must be there."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((y * randn(*y.shape, dtype=y.dtype, seed=7 + i)).sum() for i, y in enumerate(outputs)).backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return [leaf.grad for leaf in leaves]
