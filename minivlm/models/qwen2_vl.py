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

Sections: configuration, the tower, the model, sizes of pictures and frames, the processor.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minivlm import ops
from minivlm.cache import KVCache
from minivlm.console import note_once
from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel, embed
from minivlm.image_config import CLIP_DEFAULTS, FILM_BOOKKEEPING, ImageConfig, read_settings
from minivlm.images import pixel_table, resize
from minivlm.inputs import Inputs
from minivlm.layers import MLP, Linear, activation, attention
from minivlm.models.llava import is_tied
from minivlm.positions import Rope, RopeConfig, mrope_positions
from minivlm.processor import BaseProcessor
from minivlm.videos import FILM_OPTIONS, Film, FilmRule, check_film_options, open_video

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

# What a silent preprocessor_config.json leaves out. Source: transformers' Qwen2VLImageProcessor.
IMAGE_DEFAULTS = {**CLIP_DEFAULTS, "do_center_crop": False, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}

# What a part of a message may ask for its picture or film, in pixels.
LIMIT_OPTIONS, SIZE_OPTIONS = ("min_pixels", "max_pixels"), ("resized_height", "resized_width")

MAX_RATIO = 200  # of a picture's longer side to the shorter
# A film. Source: qwen-vl-utils, transformers' Qwen2VLVideoProcessor.
FPS = 2.0  # frames taken per second
MIN_FRAME_TOKENS, MAX_FRAME_TOKENS = 128, 768  # per frame, before pairs of frames become one
FILM_NUMBERS = {"min_frames": 4, "max_frames": 768, "max_video_tokens": 128_000}  # a tenth of the tokens is for text

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
    def cell(self) -> int:
        """Side of one token's square in pixels; both sides of a picture are multiples of it."""
        return self.patch_size * self.merge

    @property
    def patch_dim(self) -> int:
        """Numbers of one patch: 3 colours × 2 frames × 14 × 14."""
        return 3 * self.frames * self.patch_size**2

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


# ---------------------------------------------------------------------------------------- sizes of pictures and frames


def smart_resize(size: tuple[int, int], cell: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `cell` pixels, as near to `size` and its shape as min_pixels and max_pixels let.

    Each side is rounded (Python's `round`: halves to even). If the area is then too large, both sides shrink by one
    factor and are rounded down; if it is too small, they grow and are rounded up. Raises for a picture more than
    MAX_RATIO times as long as it is wide.
    """
    height, width = size
    if max(size) > MAX_RATIO * min(size):
        raise MinivlmError(
            f"a picture of {height} x {width} pixels is more than {MAX_RATIO} times as long as it is wide: crop it"
        )
    if min_pixels > max_pixels:
        raise MinivlmError(f"min_pixels is {min_pixels}, which is more than max_pixels, {max_pixels}")
    sides = [round(side / cell) * cell for side in size]
    if math.prod(sides) > max_pixels:
        factor = math.sqrt(height * width / max_pixels)
        sides = [max(cell, math.floor(side / factor / cell) * cell) for side in size]
    elif math.prod(sides) < min_pixels:
        factor = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * factor / cell) * cell for side in size]
    return sides[0], sides[1]


def num_image_tokens(grid: tuple[int, int, int], merge: int) -> int:
    """Tokens of a picture or film of `grid` frame pairs, rows and columns of patches."""
    return math.prod(grid) // merge**2


def patchify(
    frames: list[Image.Image], images: ImageConfig, vision: VisionConfig
) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames of one size, a picture's or a film's → patches `(P, patch_dim)` in raster order, and their grid (t, h, w).

    The last frame is repeated where it has no partner.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))  # (I, height, width, 3)
    patches = ops.patchify(pixels, torch.from_numpy(pixel_table(images)), vision.frames, vision.patch_size)
    height, width = pixels.shape[1:3]
    return patches, (-(-len(frames) // vision.frames), height // vision.patch_size, width // vision.patch_size)


def pixel_limits(settings: dict) -> dict:
    """Image settings with `min_pixels` and `max_pixels` in the place of `size`.

    Newer files call these areas the `shortest_edge` and `longest_edge` of a `size`. Where both stand, as in files of
    transformers 4.45, the plain names win.
    """
    size = settings.get("size")
    if size is None:
        return settings
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    size = {names.get(key, key): area for key, area in size.items()} if isinstance(size, dict) else {}
    if size.keys() != {"min_pixels", "max_pixels"}:
        raise MinivlmError("Qwen2-VL's size is the least and the greatest area: {shortest_edge, longest_edge}")
    return size | {key: value for key, value in settings.items() if key != "size" and value is not None}


def target_size(size: tuple[int, int], options: dict, images: ImageConfig, cell: int) -> tuple[int, int]:
    """(height, width) that a picture or frame is resized to. `options`: what its part of the message asks for."""
    wanted = [options[key] for key in SIZE_OPTIONS if key in options]
    if wanted:
        if len(wanted) != 2 or not all(isinstance(side, int) and side > 0 for side in wanted):
            raise MinivlmError("resized_height and resized_width are given together, in pixels")
        size = (wanted[0], wanted[1])
    elif not images.do_resize:
        if size[0] % cell or size[1] % cell:
            raise MinivlmError(f"do_resize is off, but {size[0]} x {size[1]} pixels are not multiples of {cell}")
        return size
    limits = images.override({key: options[key] for key in LIMIT_OPTIONS if key in options})
    return smart_resize(size, cell, limits.min_pixels, limits.max_pixels)


@dataclass(frozen=True)
class Settings:
    """How a checkpoint wants pictures, and the frames of films, which have limits of their own."""

    pictures: ImageConfig
    frames: ImageConfig
    sampling: FilmRule
    film_tokens: int | None  # that the frame pairs of a film may have together; None: no such limit
    asked: int | None = None  # a caller's max_pixels

    @classmethod
    def from_folder(cls, folder: Path, vision: VisionConfig) -> "Settings":
        """A folder without settings for films, as the published ones, speaks of pictures alone: frames have
        qwen-vl-utils' limits then, where transformers would take the pictures', 16384 tokens for each.

        Files are always sampled, frames that are given never, whatever `do_sample_frames` says.
        """
        grid = {"patch_size": vision.patch_size, "temporal_patch_size": vision.frames, "merge_size": vision.merge}
        pictures = ImageConfig.from_hf(pixel_limits(read_settings(folder, "image")), IMAGE_DEFAULTS | grid)
        hf = read_settings(folder, "video")
        numbers = FILM_NUMBERS | {key: hf[key] for key in FILM_NUMBERS if hf.get(key) is not None}
        if not all(isinstance(number, int) and number > 0 for number in numbers.values()):
            raise MinivlmError(f"the settings for films: {', '.join(numbers)} are positive integers")
        rate = check_film_options({key: hf.get(key) for key in ("fps", "num_frames")}) or {"fps": FPS}
        limits = {"min_pixels": MIN_FRAME_TOKENS * vision.cell**2, "max_pixels": MAX_FRAME_TOKENS * vision.cell**2}
        others = {*FILM_NUMBERS, *FILM_BOOKKEEPING, "cap_pixels_per_frame"}
        own = {key: value for key, value in hf.items() if key not in others}
        frames = ImageConfig.from_hf(pixel_limits(own), IMAGE_DEFAULTS | grid | limits)
        return cls(
            pictures,
            frames if hf else replace(pictures, **limits),
            FilmRule(
                rate.get("num_frames"),
                rate.get("fps"),
                multiple_of=vision.frames,
                min_frames=numbers["min_frames"],
                max_frames=numbers["max_frames"],
            ),
            None if hf.get("cap_pixels_per_frame") is False else int(0.9 * numbers["max_video_tokens"]),
        )

    def override(self, images_kwargs: dict) -> "Settings":
        """With a caller's settings on top, for pictures and frames alike."""
        given = pixel_limits(images_kwargs)
        pictures, frames = self.pictures.override(given), self.frames.override(given)
        least, most = (given.get(key) for key in LIMIT_OPTIONS)
        if least and most and least > most:
            raise MinivlmError(f"min_pixels is {least}, which is more than max_pixels, {most}")
        return replace(self, pictures=pictures, frames=frames, asked=given.get("max_pixels", self.asked))

    def share(self, num_frames: int, vision: VisionConfig) -> float:
        """Pixels that each frame has of its film's budget."""
        if self.film_tokens is None:
            return math.inf
        return self.film_tokens * vision.cell**2 * vision.frames // num_frames


def picture_patches(
    picture: Image.Image, options: dict, settings: Settings, vision: VisionConfig
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches `(P, patch_dim)` and grid of one picture."""
    images, full = settings.pictures, (picture.height, picture.width)
    size = target_size(full, options, images, vision.cell)
    patches, grid = patchify([resize(picture, size, images.resample)], images, vision)
    announce("a picture", full, size, grid, options, settings, vision)
    return patches, grid


def frame_size(
    size: tuple[int, int], num_frames: int, options: dict, settings: Settings, vision: VisionConfig
) -> tuple[int, int]:
    """(height, width) that each frame of a film is resized to.

    All frames share one budget: a long film has small frames, but none smaller than `min_pixels` by design. A size that
    was asked for is kept, within the limits of pictures; a `max_pixels` that was asked for goes before `min_pixels`.
    """
    if any(key in options for key in SIZE_OPTIONS):
        return target_size(size, options, settings.pictures, vision.cell)
    limits = settings.frames.override({key: options[key] for key in LIMIT_OPTIONS if key in options})
    asked = options.get("max_pixels", settings.asked)
    least, most = limits.min_pixels, limits.max_pixels
    if asked and "min_pixels" not in options:
        least = min(least, asked)
    most = max(min(most, settings.share(num_frames, vision)), int(1.05 * least))
    options = {"min_pixels": least, "max_pixels": min(most, asked) if asked else most}
    return target_size(size, options, settings.frames, vision.cell)


def film_patches(
    film: object, options: dict, settings: Settings, vision: VisionConfig
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches and grid of one film: a file, which is sampled, or frames, which are all taken."""
    sampling = {key: value for key, value in options.items() if key in FILM_OPTIONS}
    options = {key: value for key, value in options.items() if key not in FILM_OPTIONS}
    images, sizes = settings.frames, set()

    def prepare(frame: Image.Image, num_frames: int) -> Image.Image:
        full = (frame.height, frame.width)
        size = frame_size(full, num_frames, options, settings, vision)
        sizes.add((full, size))
        return resize(frame, size, images.resample)

    film = open_video(film, sampling, settings.sampling, prepare)
    patches, grid = patchify(film.frames, images, vision)
    for full, size in sizes:
        announce(f"a film of {len(film.frames)} frames", full, size, grid, options, settings, vision)
    announce_rate(film, sampling, settings.sampling)
    return patches, grid


def announce(
    what: str,
    full: tuple[int, int],
    size: tuple[int, int],
    grid: tuple[int, int, int],
    options: dict,
    settings: Settings,
    vision: VisionConfig,
):
    """Says on stderr that a limit which nobody asked for has shrunk something from `full` to `size`."""
    wanted = [options.get(key, side) for key, side in zip(SIZE_OPTIONS, full, strict=True)]
    most = options.get("max_pixels", settings.asked) or math.inf
    if math.prod(size) < math.prod(full) and math.prod(size) < math.prod(smart_resize(wanted, vision.cell, 1, most)):
        tokens = num_image_tokens(grid, vision.merge)
        crowded = settings.share(grid[0] * vision.frames, vision) < settings.frames.max_pixels
        more = "fewer frames may be larger" if crowded and grid[0] > 1 else "max_pixels sets another limit"
        note_once(f"{what}, {full[0]} x {full[1]} pixels, is seen at {size[0]} x {size[1]}, as {tokens} tokens; {more}")


def announce_rate(film: Film, sampling: dict, rule: FilmRule):
    """The same of a film with more frames, by the rate that was asked for, than a film may have."""
    by_number = "num_frames" in sampling or "nframes" in sampling
    rate = None if by_number else sampling.get("fps", rule.fps)
    if rate and film.seconds and len(film.frames) == rule.max_frames:
        every = (film.seconds[-1] - film.seconds[0]) / (len(film.frames) - 1)
        if every * rate > 1.01:
            taken = f"{len(film.frames)} are taken, every {every:.3g} s"
            note_once(f"a film is too long for {rate:g} frames a second: {taken}")


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = Qwen2VLConfig, TEMPLATE
    picture_options = LIMIT_OPTIONS + SIZE_OPTIONS
    film_options = LIMIT_OPTIONS + SIZE_OPTIONS + FILM_OPTIONS

    @classmethod
    def read_images(cls, folder: Path, config: Qwen2VLConfig) -> Settings:
        return Settings.from_folder(folder, config.vision)

    def override(self, images_kwargs: dict) -> Settings:
        settings = self.images.override(images_kwargs)
        check_images(settings.pictures, self.config.vision)
        check_images(settings.frames, self.config.vision)
        return settings

    def see(self, rows: list[Row], images: Settings) -> dict[str, Tensor]:
        config, vision = self.config, self.config.vision
        pictures, films = [], []  # (patches, grid) each
        for row in rows:
            given = zip(row.pictures, row.picture_options, strict=True)
            own = [picture_patches(picture, options, images, vision) for picture, options in given]
            own_films = [film_patches(film, options, images, vision) for film, options in row.films]
            counts = [num_image_tokens(grid, vision.merge) for _, grid in own]
            film_counts = [num_image_tokens(grid, vision.merge) for _, grid in own_films]
            expand(row, {config.image_token_id: counts, config.video_token_id: film_counts})
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


def check_images(images: ImageConfig, vision: VisionConfig):
    """Settings that another model's file would use, or that do not fit the tower."""
    if images.do_center_crop or images.do_pad:
        raise MinivlmError("Qwen2-VL neither crops nor pads: leave do_center_crop and do_pad off")
    if (images.patch_size, images.temporal_patch_size, images.merge_size) != (
        vision.patch_size, vision.frames, vision.merge,
    ):  # fmt: skip
        raise MinivlmError(
            f"the image settings' patch_size {images.patch_size}, temporal_patch_size {images.temporal_patch_size} and "
            f"merge_size {images.merge_size} are not the tower's {vision.patch_size}, {vision.frames}, {vision.merge}"
        )
