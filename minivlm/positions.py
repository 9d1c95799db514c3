"""Rotary position embeddings (Su et al. 2021): how fast each pair of channels turns, under every published scaling.

The rotation itself is `ops.apply_rope`. Layout: half-split, channel i turns with channel i + K/2, as in every
checkpoint here.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minivlm.errors import MinivlmError


@dataclass(frozen=True)
class RopeConfig:
    """`rope_theta` and `rope_scaling` of a config.json; `scaling` holds the numbers of its kind under their names."""

    head_dim: int
    theta: float
    max_position: int
    kind: str = "default"
    scaling: dict = field(default_factory=dict)
    sections: tuple[int, ...] | None = None  # M-RoPE: channel pairs that turn by frame, row, column

    @classmethod
    def from_hf(cls, config: dict, head_dim: int) -> "RopeConfig":
        """Reads both spellings: `rope_theta` + `rope_scaling` (hub files) and `rope_parameters` (transformers v5).

        The kind stands under `rope_type` or `type`. "mrope" and v5's "default" with a `mrope_section` are the same
        thing, so what decides is the section.
        """
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = scaling.pop("rope_theta", config["rope_theta"])
        kinds = [scaling.pop(name) for name in ("type", "rope_type") if name in scaling]
        kind = kinds[-1] if kinds else "default"
        sections = scaling.pop("mrope_section", None)
        if kind == "mrope":
            kind = "default"
        if kind == "su":  # longrope's first name
            kind = "longrope"
        if kind not in KINDS:
            raise MinivlmError(f"config.json asks for rope_scaling {kind!r}; known here: {', '.join(KINDS)}")
        if sections is not None and sum(sections) * 2 != head_dim:
            raise MinivlmError(f"mrope_section {sections} must add up to half the head width, {head_dim // 2}")
        lacking = [name for name in NEEDED.get(kind, ()) if name not in scaling]
        if lacking:
            raise MinivlmError(f"config.json asks for rope_scaling {kind!r} without {', '.join(lacking)}")
        if kind in ("yarn", "longrope", "llama3"):
            # The trained length stands beside the scaling, where it counts, or inside it, or nowhere.
            name, trained = "original_max_position_embeddings", config["max_position_embeddings"]
            scaling[name] = config.get(name) or scaling.get(name) or trained
        sections = sections and tuple(sections)
        return cls(head_dim, float(theta), config["max_position_embeddings"], kind, scaling, sections)

    def __hash__(self):
        return hash((self.head_dim, self.theta, self.kind, str(self.scaling)))


def rope_frequencies(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Radians per position of each channel pair, `(K / 2,)` float32, and the factor on the rotated vectors (yarn,
    longrope).

    `length` is the number of positions in use; only "dynamic" and "longrope" depend on it, and only beyond the
    original length.
    """
    return KINDS[config.kind](config, length)


def _default(
    config: RopeConfig,
    length: int,  # noqa: ARG001  every kind is called alike
    theta: float | None = None,
) -> tuple[Tensor, float]:
    """θ^(−2i/K): the first pair turns one radian per position, the last about θ times slower."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / ((theta or config.theta) ** exponents), 1.0


def _linear(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023): all positions squeezed by `factor`."""
    return _default(config, length)[0] / config.scaling["factor"], 1.0


def _dynamic(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """NTK-aware scaling: a larger θ, once the sequence outgrows the length the model was trained on."""
    K, factor = config.head_dim, config.scaling["factor"]
    stretch = factor * max(length, config.max_position) / config.max_position - (factor - 1)
    return _default(config, length, config.theta * stretch ** (K / (K - 2)))


def _llama3(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Llama 3.1: slow pairs are slowed by `factor`, fast ones left alone, those between are blended."""
    inv_freq, _ = _default(config, length)
    s = config.scaling
    original = s["original_max_position_embeddings"]
    turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
    blend = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return (1 - blend) * inv_freq / s["factor"] + blend * inv_freq, 1.0


def _yarn(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, §3.2): slow pairs interpolated, fast ones kept; attention sharper by 0.1 ln s + 1."""
    s, K = config.scaling, config.head_dim
    original = s["original_max_position_embeddings"]
    factor = s.get("factor") or config.max_position / original

    def sharpening(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = s.get("attention_factor")
    if scale is None and s.get("mscale") and s.get("mscale_all_dim"):
        scale = sharpening(s["mscale"]) / sharpening(s["mscale_all_dim"])
    elif scale is None:
        scale = sharpening(1.0)

    def pair_with(num_turns: float) -> float:  # the (fractional) pair that turns this often in the original context
        return K * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with(s.get("beta_fast") or 32), pair_with(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, K - 1)
    inv_freq, _ = _default(config, length)
    ramp = ((torch.arange(K // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(scale)


def _longrope(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024): a searched factor per pair, one list within the original length, one beyond it."""
    s = config.scaling
    original = s["original_max_position_embeddings"]
    per_pair = torch.tensor(s["long_factor"] if length > original else s["short_factor"], dtype=torch.float32)
    factor = s.get("factor") or config.max_position / original
    scale = s.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _default(config, length)[0] / per_pair, float(scale)


KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
NEEDED = {  # numbers without a default
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
GROWS_WITH_LENGTH = ("dynamic", "longrope")


class Rope:
    """The frequencies of one decoder, computed when first asked for and kept per device."""

    def __init__(self, config: RopeConfig):
        self.config = config
        self.known: dict = {}

    def at(self, length: int, device) -> tuple[Tensor, float]:
        if self.config.kind not in GROWS_WITH_LENGTH:
            length = 0  # one answer for every length
        if (length, device) not in self.known:
            self.known.clear()  # dynamic scaling asks for a new length every token; one answer is worth keeping
            with torch.inference_mode(False):  # kept for training, too, which cannot use inference tensors
                inv_freq, scale = rope_frequencies(self.config, length)
                self.known[length, device] = inv_freq.to(device), scale
        return self.known[length, device]


def text_positions(attention_mask: Tensor) -> Tensor:
    """`(B, T)` mask → `(B, T)` positions that count the real tokens of each row from 0; padding stands at 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def mrope_positions(input_ids: Tensor, attention_mask: Tensor, grids: dict[int, Tensor | None], merge: int) -> Tensor:
    """M-RoPE (Wang et al. 2024, section 2.1): frame, row and column of every token, `(3, B, T)` int64.

    `grids[placeholder id] (pictures or films, 3)` are frame pairs, rows and columns of patches of what the placeholders
    stand for, in order, row of the batch by row; `merge` patches along a side are one token. A token of text counts up
    all three numbers alike. A picture or film is a block of (t, h, w) tokens that starts where the text before it ends;
    the text behind it goes on at start + max(t, h, w), the paper's rule (transformers 5 goes on at start + max(h, w),
    which differs for long films of small frames). So positions are fewer than tokens. Padding stands at 0.

        a 1 × 2 × 2 block between words:  frame   0 1 1 1 1 3
                                          row     0 1 1 2 2 3
                                          column  0 1 2 1 2 3
    """
    queues = {token_id: iter([] if grid is None else grid.tolist()) for token_id, grid in grids.items()}
    ids, steps = input_ids.cpu(), attention_mask.to("cpu", copy=True)  # how far the position moves on behind each token
    within = torch.zeros(3, *ids.shape, dtype=torch.int64)  # position inside its block; words have none
    is_vision = torch.isin(ids, torch.tensor(list(queues)))
    for row in range(ids.shape[0]):
        slots = is_vision[row].nonzero()[:, 0].tolist()
        while slots:
            start = slots[0]
            t, h, w = next(queues[int(ids[row, start])])
            h, w = h // merge, w // merge
            end = start + t * h * w
            within[:, row, start:end] = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
            steps[row, start:end] = 0
            steps[row, end - 1] = max(t, h, w)
            slots = slots[t * h * w :]
    return (steps.cumsum(-1) - steps + within).to(input_ids.device)
