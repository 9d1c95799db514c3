"""From an RGB picture to pixels: the arithmetic of transformers' PIL image processors, bit for bit.

Holds what several families share: CLIP's resize-crop-normalise, and anyres, which lays a large picture out as a grid of
tiles the tower can see. What one family does alone (Qwen2-VL's patches, Mllama's canvases) is in its model's file.
Opening pictures is open_image.py's, reading a checkpoint's config image_config.py's.

Sizes are (height, width) in pixels; grids are (rows, columns). PIL's (width, height) is turned round where PIL is
touched. Pinpoints are the canvases anyres may choose from, as (height, width); the original LLaVA repositories write
the same numbers as (width, height): turn theirs round when reading their config, the rest is equal.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from minivlm.errors import MinivlmError
from minivlm.image_config import ImageConfig, Size

MAX_RESIZED_PIXELS = 64_000_000  # that a resize may make: a 20000 x 1 picture at shortest edge 336 has 2.3 billion
MAX_SQUARE_PIXELS = 500_000_000  # that padding may make: 2 GB for a moment, for a side of 22,000


def to_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """RGB picture → (3, height, width) float32: pad to a square, resize, centre crop, rescale, normalise, each if the
    config says so. LLaVA-1.5's, Video-LLaVA's and SigLIP's whole preprocessing; anyres applies it to each tile."""
    if config.do_pad:
        image = expand_to_square(image, mean_colour(config))
    return _finish(image, config)


def _finish(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    if config.do_resize:
        height, width = resized_size((image.height, image.width), config.size)
        if height * width > MAX_RESIZED_PIXELS and config.do_center_crop:
            image = _resize_centre(image, (height, width), config.crop_size, config.resample)
        else:
            image = resize(image, (height, width), config.resample)
    if config.do_center_crop:
        image = center_crop(image, config.crop_size)
    return normalise(image, config)


def resized_size(image_size: tuple[int, int], size: Size) -> tuple[int, int]:
    """(height, width) after the resize that `size` asks for."""
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge and not size.longest_edge:
        return shortest_edge_size(image_size, size.shortest_edge)
    raise MinivlmError(f"the image processor's size {size.given()} is not height and width, nor shortest_edge alone")


def shortest_edge_size(image_size: tuple[int, int], edge: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `edge` pixels and the longer in proportion, cut by int()."""
    height, width = image_size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """PIL's resize on uint8, which rounds after the horizontal pass and again after the vertical."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    if height * width > MAX_RESIZED_PIXELS:
        raise MinivlmError(
            f"a picture of {image.height} x {image.width} pixels would be resized to {height} x {width}: crop it first"
        )
    return image.resize((width, height), resample)


def _resize_centre(image: Image.Image, size: tuple[int, int], crop: tuple[int, int], resample: int) -> Image.Image:
    """The middle of what `resize` gives, at most `crop`, made from the middle of the picture alone: for pictures so
    long that the whole would not fit into memory. Equal but for the rounding of PIL's float32 box."""
    rows = _middle(image.height, size[0], crop[0])
    columns = _middle(image.width, size[1], crop[1])
    image = image.crop((columns.start, rows.start, columns.end, rows.end))
    box = (columns.box_start, rows.box_start, columns.box_end, rows.box_end)
    return image.resize((columns.out, rows.out), resample, box=box)


class _Middle(NamedTuple):
    start: int  # pixels of the picture that are read: start to end
    end: int
    box_start: float  # what the output shows, from `start`
    box_end: float
    out: int  # pixels of the output


def _middle(length: int, resized: int, crop: int) -> _Middle:
    """One axis of `_resize_centre`."""
    out, scale = min(crop, resized), length / resized
    first = (resized - out) // 2 * scale
    reach = math.ceil(5 * max(1.0, scale)) + 1  # of PIL's widest filter
    start = max(math.floor(first) - reach, 0)
    end = min(math.ceil(first + out * scale) + reach, length)
    return _Middle(start, end, first - start, min(first - start + out * scale, end - start), out)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle `size` of a picture; what lies outside a smaller picture is black. Odd remainders: one pixel less is
    cut before than after, one more is added before than after."""
    height, width = size
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def normalise(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """RGB picture → (3, height, width) float32."""
    table, pixels = pixel_table(config), np.asarray(image)  # (3, 256), (height, width, 3)
    out = np.empty((3, image.height, image.width), dtype=np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=out[channel], mode="clip")  # "clip": without a copy of `out`
    return torch.from_numpy(out)


def pixel_table(config: ImageConfig) -> np.ndarray:
    """→ (3, 256) float32: what each uint8 becomes in each channel. It has 256 values, so rescaling and normalising,
    each if the config says so, are done once on those. To be read only: it is kept for the next picture."""
    return _pixel_table(
        config.rescale_factor if config.do_rescale else 1.0,
        config.image_mean if config.do_normalize else (0.0, 0.0, 0.0),
        config.image_std if config.do_normalize else (1.0, 1.0, 1.0),
    )


@functools.lru_cache(maxsize=8)
def _pixel_table(factor: float, mean: tuple, std: tuple) -> np.ndarray:
    """Rescaled in float64, normalised in float32, as the reference does."""
    values = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
    return (values - np.array(mean, dtype=np.float32)[:, None]) / np.array(std, dtype=np.float32)[:, None]


def expand_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side; an odd remainder's smaller half comes before."""
    side = max(image.size)
    if side * side > MAX_SQUARE_PIXELS:
        raise MinivlmError(f"a picture of {image.height} x {image.width} pixels is too long to pad: crop it first")
    return _centred(image, (side, side), colour)


def mean_colour(config: ImageConfig) -> tuple[int, int, int]:
    """The colour that LLaVA-1.5 pads with: int() of the mean, (122, 116, 104) for CLIP's."""
    red, green, blue = (int(mean * 255) for mean in config.image_mean)
    return red, green, blue


def _centred(image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    if (image.height, image.width) == size:
        return image
    height, width = size
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


# ---- anyres: LLaVA-NeXT's and LLaVA-OneVision's grids of tiles


def anyres_tiles(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """RGB picture → (1 + rows * columns, 3, tile, tile) float32: the whole picture squashed to a square, then the
    tiles of its best pinpoint row by row, on black.

    `config.do_resize` turns off only the last resize of each view, as in the reference."""
    target = select_best_resolution((image.height, image.width), config.image_grid_pinpoints)
    base = (config.size.height, config.size.width)
    if None in base:
        base = (config.size.shortest_edge, config.size.shortest_edge)
    fitted = resize(image, fitted_size((image.height, image.width), target), config.resample)
    views = [resize(image, base, config.resample), *split_tiles(_centred(fitted, target, (0, 0, 0)), config.tile)]
    return torch.stack([_finish(view, config) for view in views])


def anyres_grid(image_size: tuple[int, int], pinpoints: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles that a picture is cut into."""
    height, width = select_best_resolution(image_size, pinpoints)
    if height % tile or width % tile:
        raise MinivlmError(f"image_grid_pinpoints: {height} x {width} pixels are not whole tiles of {tile}")
    return height // tile, width // tile


def select_best_resolution(image_size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The pinpoint that keeps most of the picture's pixels, and of those the one that wastes fewest of its own. The
    first wins a tie: a small square picture gets whatever the list begins with."""
    height, width = image_size
    best, most_kept, least_wasted = None, -1, 0
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = target_height * target_width - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (target_height, target_width), kept, wasted
    return best


def fitted_size(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture scaled to touch `target` from inside; the other side by ceil()."""
    height, width = image_size
    target_height, target_width = target
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target_height), target_width
    return target_height, min(math.ceil(width * scale_height), target_width)


def split_tiles(image: Image.Image, tile: int) -> list[Image.Image]:
    """The square tiles of a picture, row by row."""
    return [
        image.crop((left, top, left + tile, top + tile))
        for top in range(0, image.height, tile)
        for left in range(0, image.width, tile)
    ]


def unpadded_grid(
    image_size: tuple[int, int], grid: tuple[int, int], *, round_first: bool = True
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of the part of a grid of patches that shows the picture and not its black bars.

    `image_size`: the original picture's. `grid`: rows and columns of patches over all tiles. Half the bars, rounded
    down, is cut on both sides, so one row or column of bar may stay. `round_first`: to 7 decimals before int(), as
    transformers does so that 23.99999999 is 24; the original repositories do not (False).
    A very long picture may keep no row at all."""
    height, width = image_size
    rows, columns = grid
    if width / height > columns / rows:
        shown = height * (columns / width)
        top, left = (rows - int(round(shown, 7) if round_first else shown)) // 2, 0
    else:
        shown = width * (rows / height)
        top, left = 0, (columns - int(round(shown, 7) if round_first else shown)) // 2
    return top, left, rows - 2 * top, columns - 2 * left
