"""Rotary position embedding (Su et al. 2021): text's 1-D form, Qwen2-VL's M-RoPE and the vision tower's 2-D form.

One layout only: *half-split*. Channel i turns together with channel i + K/2, as in every checkpoint this package reads.
"""

import torch
from torch import Tensor

from minivlm.errors import MinivlmError
from minivlm.ops import backend

MAX_POSITION = 2**24  # beyond it float32 skips integers


def apply_rope_reference(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, sections: list[int] | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    if positions.is_cpu and not torch.compiler.is_compiling() and (positions.abs() > MAX_POSITION).any():
        raise MinivlmError(f"apply_rope: position {positions.abs().max()} is beyond {MAX_POSITION}, a float32's reach")
    rows = positions[None] if sections is None else positions  # (R, B, T)
    parts = inv_freq.split(sections or inv_freq.size(0))
    angle = torch.cat([row.float()[..., None] * part for row, part in zip(rows, parts, strict=True)], -1)  # (B, T, K/2)
    angle = angle.to(torch.promote_types(q.dtype, torch.float32))[:, :, None]  # (B, T, 1, K/2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, sections: list[int] | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Turn the channel pairs of `q (B, T, H, K)` and `k (B, T, G, K)` by `position * inv_freq`, into new tensors.

    positions: int64, `(B, T)`; or `(R, B, T)` with `sections`, R numbers that add up to K/2: the frequencies of
        section j turn by row j. M-RoPE is `[16, 24, 24]`, the vision tower's rows and columns are `[20, 20]`.
    inv_freq: `(K/2,)`, float32 whatever the model's dtype: in bfloat16 position 1000 is off by whole turns.
    scale: multiplies the result (yarn's attention factor).
    Positions beyond 2^24 are an error on a CPU and NaN on a GPU, which cannot stop to complain.
    """
    _check(q, k, positions, inv_freq, sections)
    kernels = backend.kernels_for(q)
    if kernels is None:
        return apply_rope_reference(q, k, positions, inv_freq, sections, scale)
    return kernels.apply_rope(q, k, positions, inv_freq, sections, scale)


def _check(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, sections: list[int] | None) -> None:
    four = q.dim() == 4 and k.dim() == 4
    B, T, _, K = q.shape if four else (0, 0, 0, 0)
    if not four or k.shape[:2] != (B, T) or k.size(3) != K or inv_freq.shape != (K // 2,) or K % 2:
        raise MinivlmError(
            f"apply_rope: q {tuple(q.shape)}, k {tuple(k.shape)} and inv_freq {tuple(inv_freq.shape)} do not fit: "
            "they must be (B, T, H, K), (B, T, G, K), (K/2,)"
        )
    backend.check_devices("apply_rope", "q k positions inv_freq", q, k, positions, inv_freq)
    if q.dtype != k.dtype:
        raise MinivlmError(f"apply_rope: q is {q.dtype}, k is {k.dtype}; make them alike")
    if inv_freq.dtype != torch.float32 or positions.dtype != torch.int64:
        raise MinivlmError(
            f"apply_rope: inv_freq is {inv_freq.dtype}, positions are {positions.dtype}; use float32 and int64"
        )
    wanted = (B, T) if sections is None else (len(sections), B, T)
    if positions.shape != wanted:
        raise MinivlmError(f"apply_rope: positions are {tuple(positions.shape)}, q and sections ask for {wanted}")
    if sections is not None and (sum(sections) != K // 2 or min(sections) < 0):
        raise MinivlmError(f"apply_rope: sections {list(sections)} add up to {sum(sections)}, K/2 is {K // 2}")


@backend.on_load
def _register(library: str) -> None:
    """The gradient of a rotation by +angle is a rotation by -angle: the same kernel, with the positions negated."""
    op = getattr(torch.ops, library).apply_rope

    def remember(ctx, inputs, output):  # noqa: ARG001, torch passes them by name
        _, _, positions, inv_freq, ctx.sections, ctx.scale = inputs
        ctx.save_for_backward(positions, inv_freq)

    def backward(ctx, grad_q, grad_k):
        positions, inv_freq = ctx.saved_tensors
        return *op(grad_q, grad_k, -positions, inv_freq, ctx.sections, ctx.scale), None, None, None, None

    torch.library.register_fake(
        f"{library}::apply_rope",
        lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    )
    torch.library.register_autograd(f"{library}::apply_rope", backward, setup_context=remember)
