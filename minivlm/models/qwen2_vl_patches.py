"""Qwen2-VL's pictures and films on their way to the tower: how large they are seen, cut into patches, what is told.

    picture → the nearest size in whole cells, within min_pixels and max_pixels → patches (P, 1176), one layer
    film    → frames, sampled → one size for all, of the budget that they share → patches (P, 1176), a layer per pair

A cell is one token's square, 2 × 2 patches; both sides of whatever is seen are multiples of it. The network is in
`qwen2_vl.py`. Source: transformers' Qwen2VLImageProcessor and Qwen2VLVideoProcessor, qwen-vl-utils.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm import ops
from minivlm.console import note_once
from minivlm.errors import MinivlmError
from minivlm.image_config import CLIP_DEFAULTS, FILM_BOOKKEEPING, LARGEST, ImageConfig, read_settings
from minivlm.images import pixel_table, resize
from minivlm.videos import FILM_OPTIONS, Film, FilmRule, check_film_options, open_video

# What a silent preprocessor_config.json leaves out.
IMAGE_DEFAULTS = {**CLIP_DEFAULTS, "do_center_crop": False, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}

# What a part of a message may ask for its picture or film, in pixels.
LIMIT_OPTIONS, SIZE_OPTIONS = ("min_pixels", "max_pixels"), ("resized_height", "resized_width")
PICTURE_OPTIONS = LIMIT_OPTIONS + SIZE_OPTIONS

MAX_RATIO = 200  # of a picture's longer side to the shorter
FPS = 2.0  # frames taken per second of a film
MIN_FRAME_TOKENS, MAX_FRAME_TOKENS = 128, 768  # per frame, before pairs of frames become one
FILM_NUMBERS = {"min_frames": 4, "max_frames": 768, "max_video_tokens": 128_000}  # a tenth of the tokens is for text


def cell_of(images: ImageConfig) -> int:
    """Side of one token's square in pixels."""
    return images.patch_size * images.merge_size


def num_image_tokens(grid: tuple[int, int, int], merge: int) -> int:
    """Tokens of a picture or film of `grid` frame pairs, rows and columns of patches."""
    return math.prod(grid) // merge**2


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """How a checkpoint wants pictures, and the frames of films, which have limits of their own."""

    pictures: ImageConfig
    frames: ImageConfig
    sampling: FilmRule
    film_tokens: int | None  # that the frame pairs of a film may have together; None: no such limit
    asked: int | None = None  # a caller's max_pixels

    @classmethod
    def from_folder(cls, folder: Path, cuts: dict[str, int]) -> "Settings":
        """`cuts`: patch_size, temporal_patch_size and merge_size of the tower.

        A folder without settings for films, as the published ones, speaks of pictures alone: frames have qwen-vl-utils'
        limits then, where transformers would take the pictures', 16384 tokens for each. Files are always sampled,
        frames that are given never, whatever `do_sample_frames` says.
        """
        defaults = IMAGE_DEFAULTS | cuts
        pictures = ImageConfig.from_hf(pixel_limits(read_settings(folder, "image")), defaults)
        token = cell_of(pictures) ** 2  # pixels
        hf = read_settings(folder, "video")
        numbers = FILM_NUMBERS | {key: hf[key] for key in FILM_NUMBERS if hf.get(key) is not None}
        if not all(isinstance(number, int) and number > 0 for number in numbers.values()):
            raise MinivlmError(f"the settings for films: {', '.join(numbers)} are positive integers")
        rate = check_film_options({key: hf.get(key) for key in ("fps", "num_frames")}) or {"fps": FPS}
        limits = {"min_pixels": MIN_FRAME_TOKENS * token, "max_pixels": MAX_FRAME_TOKENS * token}
        others = {*FILM_NUMBERS, *FILM_BOOKKEEPING, "cap_pixels_per_frame"}
        own = {key: value for key, value in hf.items() if key not in others}
        frames = ImageConfig.from_hf(pixel_limits(own), defaults | limits)
        return cls(
            pictures,
            frames if hf else replace(pictures, **limits),
            FilmRule(
                rate.get("num_frames"),
                rate.get("fps"),
                multiple_of=cuts["temporal_patch_size"],
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

    def share(self, num_frames: int) -> float:
        """Pixels that each frame has of its film's budget."""
        if self.film_tokens is None:
            return math.inf
        return self.film_tokens * cell_of(self.frames) ** 2 * self.frames.temporal_patch_size // num_frames


def check_images(images: ImageConfig, cuts: dict[str, int]):
    """Settings that another model's file would use, or that do not fit the tower."""
    if images.do_center_crop or images.do_pad:
        raise MinivlmError("Qwen2-VL neither crops nor pads: leave do_center_crop and do_pad off")
    for name, own in cuts.items():
        if (given := getattr(images, name)) != own:
            raise MinivlmError(f"the image settings' {name} {given} is not the tower's, {own}")


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


# --------------------------------------------------------------------------------------------------- pictures and films


def picture_patches(picture: Image.Image, options: dict, settings: Settings) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches `(P, patch_dim)` and grid of one picture. `options`: what its part of the message asks for."""
    images, full = settings.pictures, (picture.height, picture.width)
    size = target_size(full, options, images)
    patches, grid = patchify([resize(picture, size, images.resample)], images)
    announce("a picture", full, size, grid, options, settings)
    return patches, grid


def film_patches(film: object, options: dict, settings: Settings) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches and grid of one film: a file, which is sampled, or frames, which are all taken."""
    sampling = {key: value for key, value in options.items() if key in FILM_OPTIONS}
    options = {key: value for key, value in options.items() if key not in FILM_OPTIONS}
    images, sizes = settings.frames, set()

    def prepare(frame: Image.Image, num_frames: int) -> Image.Image:
        full = (frame.height, frame.width)
        size = frame_size(full, num_frames, options, settings)
        sizes.add((full, size))
        return resize(frame, size, images.resample)

    film = open_video(film, sampling, settings.sampling, prepare)
    patches, grid = patchify(film.frames, images)
    for full, size in sizes:
        announce(f"a film of {len(film.frames)} frames", full, size, grid, options, settings)
    announce_rate(film, sampling, settings.sampling)
    return patches, grid


def patchify(frames: list[Image.Image], images: ImageConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames of one size, a picture's or a film's → patches `(P, patch_dim)` in raster order, and their grid (t, h, w).

    The last frame is repeated where it has no partner.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))  # (I, height, width, 3)
    t, p = images.temporal_patch_size, images.patch_size
    patches = ops.patchify(pixels, torch.from_numpy(pixel_table(images)), t, p)
    height, width = pixels.shape[1:3]
    return patches, (-(-len(frames) // t), height // p, width // p)


# --------------------------------------------------------------------------------------------------------------- sizes


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


def target_size(size: tuple[int, int], options: dict, images: ImageConfig) -> tuple[int, int]:
    """(height, width) that a picture or frame of `size` is resized to."""
    wanted = [options[key] for key in SIZE_OPTIONS if key in options]
    if wanted:
        if len(wanted) != 2 or not all(type(side) is int and 0 < side < LARGEST for side in wanted):
            raise MinivlmError("resized_height and resized_width are given together, in pixels")
        size = (wanted[0], wanted[1])
    elif not images.do_resize:
        side = cell_of(images)
        if size[0] % side or size[1] % side:
            raise MinivlmError(f"do_resize is off, but {size[0]} x {size[1]} pixels are not multiples of {side}")
        return size
    limits = images.override({key: options[key] for key in LIMIT_OPTIONS if key in options})
    return smart_resize(size, cell_of(images), limits.min_pixels, limits.max_pixels)


def frame_size(size: tuple[int, int], num_frames: int, options: dict, settings: Settings) -> tuple[int, int]:
    """(height, width) that each frame of a film is resized to, of `size` in the source.

    All frames share one budget: a long film has small frames, but none smaller than `min_pixels` by design. A size that
    was asked for is kept, within the limits of pictures; a `max_pixels` that was asked for goes before `min_pixels`.
    """
    if any(key in options for key in SIZE_OPTIONS):
        return target_size(size, options, settings.pictures)
    limits = settings.frames.override({key: options[key] for key in LIMIT_OPTIONS if key in options})
    asked = options.get("max_pixels", settings.asked)
    least, most = limits.min_pixels, limits.max_pixels
    if asked and "min_pixels" not in options:
        least = min(least, asked)
    most = max(min(most, settings.share(num_frames)), int(1.05 * least))
    options = {"min_pixels": least, "max_pixels": min(most, asked) if asked else most}
    return target_size(size, options, settings.frames)


# ------------------------------------------------------------------------------------------------------- what is told


def announce(
    what: str,
    full: tuple[int, int],
    size: tuple[int, int],
    grid: tuple[int, int, int],
    options: dict,
    settings: Settings,
):
    """Says on stderr that a limit which nobody asked for has shrunk something from `full` to `size`."""
    wanted = [options.get(key, side) for key, side in zip(SIZE_OPTIONS, full, strict=True)]
    most = options.get("max_pixels", settings.asked) or math.inf
    cell = cell_of(settings.pictures)
    if math.prod(size) < math.prod(full) and math.prod(size) < math.prod(smart_resize(wanted, cell, 1, most)):
        tokens = num_image_tokens(grid, settings.pictures.merge_size)
        crowded = settings.share(grid[0] * settings.frames.temporal_patch_size) < settings.frames.max_pixels
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
