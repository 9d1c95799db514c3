"""RMSNorm, alone and fused with the residual addition before it (Zhang and Sennrich 2019, equation 4)."""

import torch
from torch import Tensor

from minivlm.errors import MinivlmError


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`; the mean in float32, the cast back *before* the multiply, as Llama has it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm_reference(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x (..., D)`, any strides, and scale it by `weight (D,)`; returns `(..., D)`."""
    _check(x, weight)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(residual + x), residual + x)`, both `(..., D)`: one read where two ops would need two."""
    if residual.shape != x.shape:
        raise MinivlmError(f"add_rms_norm: residual is {tuple(residual.shape)}, x is {tuple(x.shape)}; make them alike")
    _check(x, weight)
    return add_rms_norm_reference(residual, x, weight, eps)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 1 or x.dim() == 0 or x.size(-1) != weight.size(0):
        raise MinivlmError(f"rms_norm: x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; weight must be (last of x,)")
