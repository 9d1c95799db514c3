"""Rotary position embedding (Su et al. 2021): text's 1-D form, Qwen2-VL's M-RoPE and the vision tower's 2-D form.

One layout only: *half-split*. Channel i turns together with channel i + K/2, as in every checkpoint this package reads.
"""

import torch
from torch import Tensor

from minivlm.errors import MinivlmError


def apply_rope_reference(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, sections: list[int] | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
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
    """Turn every channel pair of `q (B, T, H, K)` and `k (B, T, G, K)` by `position * inv_freq`; returns both, contiguous.

    positions: int64, `(B, T)`; or `(R, B, T)` with `sections`, R numbers that add up to K/2: the frequencies of
        section j turn by row j. M-RoPE is `[16, 24, 24]`, the vision tower's rows and columns are `[20, 20]`.
    inv_freq: `(K/2,)`, float32 whatever the model's dtype: in bfloat16 position 1000 is off by whole turns.
    scale: multiplies the result (yarn's attention factor).
    """
    _check(q, k, positions, inv_freq, sections)
    return apply_rope_reference(q, k, positions, inv_freq, sections, scale)


def _check(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, sections: list[int] | None) -> None:
    B, T, _, K = q.shape
    if k.shape[:2] != (B, T) or k.size(3) != K or inv_freq.shape != (K // 2,) or K % 2:
        raise MinivlmError(
            f"apply_rope: q {tuple(q.shape)}, k {tuple(k.shape)} and inv_freq {tuple(inv_freq.shape)} do not fit: "
            "they must be (B, T, H, K), (B, T, G, K), (K/2,)"
        )
    if inv_freq.dtype != torch.float32 or positions.dtype != torch.int64:
        raise MinivlmError(f"apply_rope: inv_freq is {inv_freq.dtype}, positions {positions.dtype}; use float32 and int64")
    wanted = (B, T) if sections is None else (len(sections), B, T)
    if positions.shape != wanted:
        raise MinivlmError(f"apply_rope: positions are {tuple(positions.shape)}, q and sections ask for {wanted}")
    if sections is not None and sum(sections) != K // 2:
        raise MinivlmError(f"apply_rope: sections {list(sections)} add up to {sum(sections)}, K/2 is {K // 2}")
