"""From an RGB picture to pixels: the arithmetic of transformers' PIL image processors, bit for bit.

Holds what several families share: CLIP's resize-crop-normalise, and anyres, which lays a large picture out as a grid of
tiles the tower can see. What one family does alone (Qwen2-VL's patches, Mllama's canvases) is in its model's file.
Opening pictures is open_image.py's.

Sizes are (height, width) in pixels; grids are (rows, columns). PIL's (width, height) is turned round where PIL is
touched. Pinpoints are the canvases anyres may choose from, as (height, width); the original LLaVA repositories write
the same numbers as (width, height): turn theirs round when reading their config, the rest is equal.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from minivlm.errors import MinivlmError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What transformers' CLIP, LLaVA, LLaVA-NeXT and Video-LLaVA image processors take where a config is silent.
CLIP_DEFAULTS = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,
    "do_center_crop": True, "crop_size": 224,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip

# Keys of a processor config that say nothing about pixels: which class wrote it, for which runtime.
BOOKKEEPING = {
    "processor_class", "image_processor_type", "feature_extractor_type", "auto_map", "transformers_version",
    "_valid_processor_keys", "_valid_kwargs_names", "input_data_format", "return_tensors", "device",
    "disable_grouping", "image_seq_length",
}  # fmt: skip

MAX_RESIZED_PIXELS = 64_000_000  # pixels a resize may make: a 20000 x 1 picture at shortest edge 336 has 2.3 billion


class Size(NamedTuple):
    """`size` of a processor config, in pixels; None: not given. Qwen2-VL's edges are areas, see there."""

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None


@dataclass(frozen=True)
class ImageConfig:
    """A checkpoint's image processor config (preprocessor_config.json), field by field under its own names."""

    do_resize: bool
    size: Size
    resample: int  # PIL's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming
    do_center_crop: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    crop_size: tuple[int, int] | None = None
    do_pad: bool = False  # LLaVA-1.5: pad to a square first; elsewhere as the model's file says
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None = None
    max_image_tiles: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    merge_size: int | None = None

    @classmethod
    def from_hf(cls, hf: dict, defaults: dict, overrides: dict | None = None) -> "ImageConfig":
        """`hf`: the contents of preprocessor_config.json. `defaults`: the family's, for what `hf` leaves out or has as
        null. `overrides`: a caller's `images_kwargs`. A field that is not honoured is an error that names it."""
        values = _parse(defaults) | _parse(hf) | _parse(overrides or {})
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if values.get("do_center_crop") and "crop_size" not in values:
            missing.append("crop_size")
        if missing:
            raise MinivlmError(f"the image processor config lacks {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: Path, defaults: dict, overrides: dict | None = None) -> "ImageConfig":
        """Reads `image_processor` of processor_config.json (transformers 5) or else preprocessor_config.json; a folder
        with neither takes the defaults."""
        hf = _read_json(folder / "processor_config.json").get("image_processor")
        if hf is None:
            hf = _read_json(folder / "preprocessor_config.json")
        return cls.from_hf(hf, defaults, overrides)

    def override(self, overrides: dict) -> "ImageConfig":
        """The same config with a caller's `images_kwargs` on top."""
        return replace(self, **_parse(overrides)) if overrides else self

    @property
    def tile(self) -> int:
        """Side of an anyres tile in pixels."""
        if self.crop_size:
            return self.crop_size[0]
        return self.size.height or self.size.shortest_edge


def to_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """RGB picture -> (3, height, width) float32: pad to a square, resize, centre crop, rescale, normalise, each if the
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
    raise MinivlmError(f"the image processor's size {_given(size)} is not height and width, nor shortest_edge alone")


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
    reach = math.ceil(3 * max(1.0, scale)) + 1  # of PIL's widest filter
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
    """RGB picture -> (3, height, width) float32. A uint8 has 256 values, so the arithmetic is done once on those."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1).int()  # (3, height, width)
    table = _normalised_values(
        config.rescale_factor if config.do_rescale else 1.0,
        config.image_mean if config.do_normalize else (0.0, 0.0, 0.0),
        config.image_std if config.do_normalize else (1.0, 1.0, 1.0),
    )
    out = torch.empty(pixels.shape)
    for channel, values, plane in zip(pixels, table, out, strict=True):
        torch.index_select(values, 0, channel.flatten(), out=plane.view(-1))
    return out


@functools.lru_cache(maxsize=8)
def _normalised_values(factor: float, mean: tuple, std: tuple) -> torch.Tensor:
    """-> (3, 256) float32: what each uint8 becomes in each channel. Rescaled in float64, normalised in float32."""
    values = (torch.arange(256, dtype=torch.float64) * factor).float()
    return (values - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]


def expand_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side; an odd remainder's smaller half comes before."""
    side = max(image.size)
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
    """RGB picture -> (1 + rows * columns, 3, tile, tile) float32: the whole picture squashed to a square, then the
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


# ---- reading a config


def _parse(hf: dict) -> dict:
    """A config's JSON -> fields of ImageConfig; null means not given."""
    values = {}
    for key, value in hf.items():
        if value is None or key in BOOKKEEPING:
            continue
        if key not in PARSERS:
            raise MinivlmError(f"image processor field {key!r} is not supported; remove it if it changes no pixels")
        try:
            values[key] = PARSERS[key](value)
        except (TypeError, ValueError) as error:
            raise MinivlmError(f"image processor field {key!r} cannot be {value!r}: {error}") from error
    if values.pop("default_to_square", False) and isinstance(hf.get("size"), int):
        values["size"] = Size(height=hf["size"], width=hf["size"])
    values.pop("do_convert_rgb", None)
    values.pop("data_format", None)
    return values


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it is true or false")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("it is a positive integer")
    return value


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("it is a number")
    return float(value)


def _resample(value: object) -> int:
    if value not in list(Image.Resampling):
        raise ValueError("it is one of PIL's filters, 0 to 5")
    return int(value)


def _size(value: object) -> Size:
    if isinstance(value, dict):
        size = Size(**{key: _count(edge) for key, edge in value.items() if edge is not None})
        if _given(size).keys() not in ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}):
            raise ValueError("it has height and width, or shortest_edge")
        return size
    if isinstance(value, (list, tuple)):
        return Size(*_pair(value))
    return Size(shortest_edge=_count(value))


def _given(size: Size) -> dict[str, int]:
    return {key: edge for key, edge in size._asdict().items() if edge is not None}


def _pair(value: object) -> tuple[int, int]:
    """{"height", "width"}, a pair, or one number for both."""
    if isinstance(value, dict):
        if value.keys() != {"height", "width"}:
            raise ValueError("it has height and width")
        return _count(value["height"]), _count(value["width"])
    first, second = value if isinstance(value, (list, tuple)) else (value, value)
    return _count(first), _count(second)


def _triple(value: object) -> tuple[float, float, float]:
    red, green, blue = value if isinstance(value, (list, tuple)) else (value, value, value)
    return _number(red), _number(green), _number(blue)


def _pinpoints(value: object) -> tuple[tuple[int, int], ...]:
    pairs = tuple(_pair(pair) for pair in value)
    if not pairs:
        raise ValueError("it has at least one size")
    return pairs


def _only(expected: object):
    def check(value: object) -> object:
        if value != expected:
            raise ValueError(f"only {expected!r} is supported")
        return value

    return check


PARSERS = {
    "do_resize": _flag, "do_center_crop": _flag, "do_rescale": _flag, "do_normalize": _flag, "do_pad": _flag,
    "size": _size, "crop_size": _pair, "resample": _resample, "rescale_factor": _number,
    "image_mean": _triple, "image_std": _triple, "image_grid_pinpoints": _pinpoints,
    "max_image_tiles": _count, "min_pixels": _count, "max_pixels": _count,
    "patch_size": _count, "temporal_patch_size": _count, "merge_size": _count,
    "default_to_square": _flag,  # how an integer `size` is meant
    "do_convert_rgb": _only(True),  # open_image gives RGB
    "data_format": _only("channels_first"),
}  # fmt: skip


def _read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MinivlmError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise MinivlmError(f"{path} does not hold a JSON object")
    return value
