"""RMSNorm, alone and fused with the residual addition before it (Zhang and Sennrich 2019, equation 4)."""

import torch
from torch import Tensor

from minivlm.errors import MinivlmError
from minivlm.ops import backend


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`: the mean in float32, the cast back *before* the multiply, as in Llama."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm_reference(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x (..., D)`, any strides, and scale it by `weight (D,)`; returns `(..., D)`.

    Unlike dtypes, as autocast makes them, are brought to the wider one first.
    """
    if x.shape[-1:] != weight.shape:
        raise MinivlmError(f"rms_norm: x is {tuple(x.shape)}, weight {tuple(weight.shape)}; it must be (last of x,)")
    backend.check_devices("rms_norm", "x weight", x, weight)
    if x.dtype != weight.dtype:
        x, weight = widest(x, weight)
    kernels = backend.kernels_for(x)
    return rms_norm_reference(x, weight, eps) if kernels is None else kernels.rms_norm(x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(residual + x), residual + x)`, both `(..., D)`: one pass over memory where two ops make two."""
    if residual.shape != x.shape or x.shape[-1:] != weight.shape:
        raise MinivlmError(
            f"add_rms_norm: residual is {tuple(residual.shape)}, x is {tuple(x.shape)}, weight {tuple(weight.shape)}; "
            "the first two must be alike, the last (last of x,)"
        )
    backend.check_devices("add_rms_norm", "residual x weight", residual, x, weight)
    if x.dtype != weight.dtype or residual.dtype != weight.dtype:
        residual, x, weight = widest(residual, x, weight)
    kernels = backend.kernels_for(x)
    if kernels is None:
        return add_rms_norm_reference(residual, x, weight, eps)
    return kernels.add_rms_norm(residual, x, weight, eps)


def widest(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes. Autocast leaves float32 weights beside bfloat16 activations."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@backend.on_load
def _register(library: str) -> None:
    """With n = x / rms(x): grad_x = (w * grad - n * mean(w * grad * n)) / rms(x), grad_w = sum(grad * n)."""
    ops = getattr(torch.ops, library)

    def remember(ctx, inputs, output):  # noqa: ARG001, torch passes them by name
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *ops.rms_norm_backward(grad, None, x, weight, ctx.eps), None

    def remember_total(ctx, inputs, output):
        _, _, weight, ctx.eps = inputs
        ctx.save_for_backward(output[1], weight)

    def backward_of_add(ctx, grad, grad_total):
        total, weight = ctx.saved_tensors
        grad_x, grad_weight = ops.rms_norm_backward(grad, grad_total, total, weight, ctx.eps)
        return grad_x, grad_x, grad_weight, None

    # What torch.compile sees of an op: shapes and dtypes. Results are contiguous whatever the arguments' strides.
    torch.library.register_fake(f"{library}::rms_norm", lambda x, *_: x.new_empty(x.shape))
    torch.library.register_fake(
        f"{library}::add_rms_norm", lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape))
    )
    torch.library.register_fake(
        f"{library}::rms_norm_backward", lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.size(-1)))
    )
    torch.library.register_autograd(f"{library}::rms_norm", backward, setup_context=remember)
    torch.library.register_autograd(f"{library}::add_rms_norm", backward_of_add, setup_context=remember_total)
