"""Qwen2-VL (Wang et al. 2024, arXiv:2409.12191): pictures of any size, films, and positions that know space and time.

LLaVA-NeXT cuts a large picture into tiles of the one size that its tower has learned. Qwen2-VL has a tower without a
size: its positions are rotary, so a picture keeps its shape and becomes as many tokens as it has patches, a quarter of
them after merging 2 × 2. A film is the same with more than one layer of patches, and the language model is told frame,
row and column of every token.

| | LLaVA-NeXT (`llava_next.py`) | Qwen2-VL |
|---|---|---|
| a picture becomes | an overview + tiles of 336 × 336 | one picture, both sides rounded to multiples of 28 |
| tokens | overview + grid + newlines | height · width / 28², within `min_pixels` and `max_pixels` |
| a film becomes | – | frame pairs: a patch is 2 frames × 14 × 14 pixels |
| positions in the tower | a learned table | 2-D rotary: half of the channels turn by row, half by column |
| projector | two-layer MLP per patch | `patch_merge` (LayerNorm, 2 × 2 patches side by side), then the MLP |
| positions in the text | 1-D | M-RoPE: frame, row, column; for text all three are equal |

    picture → patches (P, 1176) → 32 blocks (P, 1280) → merge (P / 4, 5120) → MLP (P / 4, D) → decoder

Patches are in raster order (frame pair, row, column) throughout, so that the merge is a visible step; transformers
orders them cell by cell when it cuts the picture, with the same result.

Sections: configuration, the tower, the model, the processor. How large pictures and frames are seen, and how they are
cut, is in `qwen2_vl_patches.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import ops
from minivlm.cache import KVCache
from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.fuse import BaseModel, embed
from minivlm.inputs import Inputs
from minivlm.layers import MLP, Linear, activation, attention
from minivlm.models.llava import is_tied
from minivlm.models.qwen2_vl_patches import (
    PICTURE_OPTIONS,
    Settings,
    check_images,
    film_patches,
    num_image_tokens,
    picture_patches,
)
from minivlm.positions import Rope, RopeConfig, mrope_positions
from minivlm.processor import BaseProcessor
from minivlm.videos import FILM_OPTIONS

# The hub's layout, then that of transformers ≥ 4.52. The longest spelling wins, so "model" is what nothing else fits.
KEYS = {
    "language_model": ("model", "model.language_model"),
    "language_model.lm_head": ("lm_head",),
    "vision_tower": ("visual", "model.visual"),
}

# What a sparse `vision_config` leaves out. Source: transformers' Qwen2VLVisionConfig.
VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

# For folders without a chat template: the published one. `add_vision_id` numbers pictures and films.
TEMPLATE = (
    "{% set seen = namespace(images=0, videos=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{% if add_vision_id %}Picture {{ seen.images }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}{% set seen.videos = seen.videos + 1 %}"
    "{% if add_vision_id %}Video {{ seen.videos }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int  # C
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    patch_size: int  # pixels, a square
    frames: int  # of a patch
    merge: int  # patches along a side of what becomes one token
    out_size: int  # D, the decoder's width
    theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers of one patch: 3 colours × 2 frames × 14 × 14."""
        return 3 * self.frames * self.patch_size**2

    @property
    def cuts(self) -> dict[str, int]:
        """How pictures become patches and tokens, under the names of the image settings, which must say the same."""
        return {"patch_size": self.patch_size, "temporal_patch_size": self.frames, "merge_size": self.merge}

    @classmethod
    def from_hf(cls, config: dict) -> "VisionConfig":
        """Trap: `hidden_size` there is the decoder's width; the tower's own is `embed_dim`."""
        c = VISION_DEFAULTS | {key: value for key, value in config.items() if value is not None}
        return cls(
            hidden_size=c["embed_dim"],
            intermediate_size=int(c["embed_dim"] * c["mlp_ratio"]),
            num_layers=c["depth"],
            num_heads=c["num_heads"],
            hidden_act=c["hidden_act"],
            patch_size=c["patch_size"],
            frames=c["temporal_patch_size"],
            merge=c["spatial_merge_size"],
            out_size=c["hidden_size"],
            theta=(c.get("rope_parameters") or {}).get("rope_theta", 10000.0),
        )


@dataclass(frozen=True)
class Qwen2VLConfig:
    text: DecoderConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    @classmethod
    def from_hf(cls, config: dict) -> "Qwen2VLConfig":
        """The text part stands at the top level (the hub's files) or under `text_config` (transformers ≥ 4.52)."""
        text = {**(config.get("text_config") or config), "model_type": "qwen2_vl_text"}
        rope = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
        text[rope] = {"mrope_section": [16, 24, 24], **(text.get(rope) or {})}
        return cls(
            text=DecoderConfig.from_hf(text, tied=is_tied(config)),
            vision=VisionConfig.from_hf(config.get("vision_config") or {}),
            image_token_id=config.get("image_token_id", 151655),
            video_token_id=config.get("video_token_id", 151656),
        )


# ----------------------------------------------------------------------------------------------------------- the tower


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel sees every patch once: it is one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.frames, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1))  # (P, patch_dim) → (P, C)


class Attention(nn.Module):
    """Every patch looks at every patch of its own picture or frame pair, and at no other."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = Linear(C, 3 * C)
        self.proj = Linear(C, C)

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor, grids: list[list[int]]) -> Tensor:
        """`x (P, C)`, `positions (2, 1, P)`. One call per picture, its frame pairs as a batch: no P × P mask."""
        P, _ = x.shape
        H, K = self.num_heads, self.head_dim
        q, k, v = self.qkv(x).view(1, P, 3, H, K).unbind(2)  # each (1, P, H, K)
        q, k = ops.apply_rope(q, k, positions, inv_freq, (K // 4, K // 4))
        sizes = [t * h * w for t, h, w in grids]
        pictures = zip(grids, *(y[0].split(sizes) for y in (q, k, v)), strict=True)
        seen = [
            attention(*(y.view(t, h * w, H, K).transpose(1, 2) for y in qkv)).flatten(0, 1)  # (t · h · w, C)
            for (t, h, w), *qkv in pictures
        ]
        return self.proj(torch.cat(seen))  # (P, C)


class Block(nn.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.hidden_size
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = MLP(C, config.intermediate_size, activation(config.hidden_act))

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor, grids: list[list[int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), positions, inv_freq, grids)
        return x + self.mlp(self.norm2(x))  # (P, C)


class Merger(nn.Module):
    """2 × 2 neighbouring patches → one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merge = config.merge
        width = config.merge**2 * config.hidden_size
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, config.out_size))

    def forward(self, x: Tensor, grid_thw: Tensor) -> Tensor:
        norm = self.ln_q
        return self.mlp(ops.patch_merge(x, grid_thw, self.merge, norm.weight, norm.bias, norm.eps))  # (P / 4, D)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.merger = Merger(config)
        # Rows and columns turn by the same frequencies, those of a head of half the width.
        self.rope = Rope(RopeConfig(config.head_dim // 2, config.theta, max_position=0))

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """`patches (P, patch_dim)` of several pictures and `grid_thw (pictures, 3)` → tokens `(P / merge², D)`."""
        grid_thw = grid_thw.cpu()
        positions = raster_positions(grid_thw).to(patches.device)[:, None]  # (2, 1, P)
        inv_freq = self.rope.at(0, patches.device)[0].repeat(2)  # (K / 2,)
        x = self.patch_embed(patches)  # (P, C)
        for block in self.blocks:
            x = block(x, positions, inv_freq, grid_thw.tolist())
        return self.merger(x, grid_thw)


def raster_positions(grid_thw: Tensor) -> Tensor:
    """Row and column of every patch within its picture: `(2, P)` int64."""
    grids = [torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3) for grid in grid_thw.tolist()]
    return torch.cat(grids).T[1:].contiguous()


# ----------------------------------------------------------------------------------------------------------- the model


class Model(BaseModel):
    Config = Qwen2VLConfig

    def __init__(self, config: Qwen2VLConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.language_model = Decoder(config.text)

    def encode_images(self, inputs: Inputs) -> Tensor:
        """`pixel_values (P, patch_dim)` → image tokens `(P / 4, D)`, one picture after another."""
        return self.vision_tower(inputs.pixel_values, inputs.image_grid_thw)

    def encode_videos(self, inputs: Inputs) -> Tensor:
        """The same for films, which only have more than one frame pair."""
        return self.vision_tower(inputs.pixel_values_videos, inputs.video_grid_thw)

    def embed(self, inputs: Inputs) -> Tensor:
        """Token embeddings `(B, T, D)`, with the tokens of pictures and films in the places of their placeholders."""
        return embed(self, inputs, self.config.image_token_id, self.config.video_token_id)

    def positions(self, inputs: Inputs) -> Tensor:
        """Frame, row and column of every token: `(3, B, T)`."""
        c = self.config
        grids = {c.image_token_id: inputs.image_grid_thw, c.video_token_id: inputs.video_grid_thw}
        return mrope_positions(inputs.input_ids, inputs.attention_mask, grids, c.vision.merge)

    def forward(self, inputs: Inputs, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits `(B, T, V)` float32; `(B, 1, V)` with `last_only`, which is all that generation needs."""
        x = self.embed(inputs)
        return self.language_model(x, inputs.attention_mask, self.positions(inputs), cache, last_only)


# ------------------------------------------------------------------------------------------------------- the processor


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = Qwen2VLConfig, TEMPLATE
    picture_options = PICTURE_OPTIONS
    film_options = PICTURE_OPTIONS + FILM_OPTIONS

    @classmethod
    def read_images(cls, folder: Path, config: Qwen2VLConfig) -> Settings:
        return Settings.from_folder(folder, config.vision.cuts)

    def override(self, images_kwargs: dict) -> Settings:
        settings = self.images.override(images_kwargs)
        for images in (settings.pictures, settings.frames):
            check_images(images, self.config.vision.cuts)
        return settings

    def see(self, rows: list[Row], images: Settings) -> dict[str, Tensor]:
        c, merge = self.config, self.config.vision.merge
        pictures, films = [], []  # (patches, grid) each
        for row in rows:
            given = zip(row.pictures, row.picture_options, strict=True)
            own = [picture_patches(picture, options, images) for picture, options in given]
            own_films = [film_patches(film, options, images) for film, options in row.films]
            counts = [num_image_tokens(grid, merge) for _, grid in own]
            film_counts = [num_image_tokens(grid, merge) for _, grid in own_films]
            expand(row, {c.image_token_id: counts, c.video_token_id: film_counts})
            pictures += own
            films += own_films
        tensors = {}
        if pictures:
            tensors["pixel_values"] = torch.cat([patches for patches, _ in pictures])  # (P, patch_dim)
            tensors["image_grid_thw"] = torch.tensor([grid for _, grid in pictures])
        if films:
            tensors["pixel_values_videos"] = torch.cat([patches for patches, _ in films])
            tensors["video_grid_thw"] = torch.tensor([grid for _, grid in films])
        return tensors
