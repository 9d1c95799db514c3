"""A checkpoint's image processor config: every field is honoured, or refused by name.

Reads preprocessor_config.json as the hub has it and as transformers 5 writes it. What the fields do is in images.py
and, for those of one family alone, in that model's file.
"""

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from minivlm.errors import MinivlmError
from minivlm.files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What transformers' CLIP, LLaVA, LLaVA-NeXT and Video-LLaVA image processors take where a config is silent.
CLIP_DEFAULTS = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,
    "do_center_crop": True, "crop_size": 224,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    "do_pad": False,
}  # fmt: skip

# Keys of a processor config that say nothing about pixels: which class wrote it, for which runtime.
BOOKKEEPING = {
    "processor_class", "image_processor_type", "feature_extractor_type", "auto_map", "transformers_version",
    "_valid_processor_keys", "_valid_kwargs_names", "input_data_format", "return_tensors", "device",
    "disable_grouping", "image_seq_length", "aspect_ratio_setting",
}  # fmt: skip
FILM_BOOKKEEPING = {"video_processor_type", "do_sample_frames", "return_metadata", "num_frames", "fps"}

LARGEST = 2**63  # a number that is asked for is less than this, so that what is computed of it is a float, too
MAX_SIDE = 2**13  # pixels of a side in a config; the largest published is 2304, OneVision's 6 x 6 tiles


class Size(NamedTuple):
    """`size` of a processor config, in pixels; None: not given. Qwen2-VL's edges are areas, see there."""

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None

    def given(self) -> dict[str, int]:
        return {key: edge for key, edge in self._asdict().items() if edge is not None}


@dataclass(frozen=True)
class ImageConfig:
    """A checkpoint's image processor config (preprocessor_config.json), field by field under its own names.

    From `image_grid_pinpoints` on, None means that the family does not have the field, and setting it is refused."""

    do_resize: bool
    size: Size
    resample: int  # Pillow's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming
    do_center_crop: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    crop_size: tuple[int, int] | None = None
    do_pad: bool = False  # to_pixels: to a square, as LlavaImageProcessor; anyres: see there
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
        null; they name every field that the family honours. `overrides`: a caller's `images_kwargs`.
        Raises MinivlmError that names a field which is unknown, foreign to the family, missing, or no such value."""
        values = _parse(defaults)
        foreign = FAMILY_FIELDS - values.keys()
        values |= _parse(hf, foreign)
        if str(hf.get("image_processor_type")).startswith(("CLIP", "Siglip")):
            values["do_pad"] = False  # there: a batch to one size, which it has after crop or resize
        values |= _parse(overrides or {}, foreign)
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise MinivlmError(f"the image processor config lacks {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: Path, defaults: dict, overrides: dict | None = None) -> "ImageConfig":
        """What `read_settings` finds; a folder without settings takes the defaults."""
        return cls.from_hf(read_settings(folder, "image"), defaults, overrides)

    def override(self, overrides: dict) -> "ImageConfig":
        """The same config with a caller's `images_kwargs` on top."""
        foreign = {field for field in FAMILY_FIELDS if self.__dict__[field] is None}
        return replace(self, **_parse(overrides, foreign)) if overrides else self

    def __post_init__(self):
        if self.do_center_crop and not self.crop_size:
            raise MinivlmError("the image processor config lacks crop_size, which do_center_crop needs")

    @property
    def tile(self) -> int:
        """Side of an anyres tile in pixels."""
        if self.crop_size:
            return self.crop_size[0]
        return self.size.height or self.size.shortest_edge


def read_settings(folder: Path, kind: str) -> dict:
    """The settings for pictures (`kind` "image") or films ("video") as a folder has them, {} if it has none: a part of
    processor_config.json (transformers 5), or else a file of their own."""
    settings = read_json(folder / "processor_config.json").get(f"{kind}_processor")
    if isinstance(settings, dict):
        return settings
    return read_json(folder / ("preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json"))


def check_film_settings(folder: Path, images: ImageConfig):
    """Refuses a folder whose settings for films are not those for pictures: frames are shown as pictures are.

    transformers has processors of two kinds, and with them two sets of settings, which in every published folder agree.
    How their processor for films chooses frames is no matter here: `videos.py` does that.
    """
    settings = read_settings(folder, "video")
    films = images.override({key: value for key, value in settings.items() if key not in FILM_BOOKKEEPING})
    if replace(films, do_pad=images.do_pad) != images:
        raise MinivlmError("this folder's image settings for films are not those for pictures: make them alike")


FAMILY_FIELDS = {
    "image_grid_pinpoints", "max_image_tiles", "min_pixels", "max_pixels",
    "patch_size", "temporal_patch_size", "merge_size",
}  # fmt: skip


def _parse(hf: dict, foreign: Iterable[str] = ()) -> dict:
    """A config's JSON → fields of ImageConfig; null means not given."""
    values = {}
    for key, value in hf.items():
        if value is None or key in BOOKKEEPING:
            continue
        if key not in PARSERS or key in foreign:
            raise MinivlmError(f"the image processor field {key!r} is not one that this model honours: remove it")
        try:
            values[key] = PARSERS[key](value)
        except (TypeError, ValueError, OverflowError) as error:
            raise MinivlmError(f"the image processor field {key!r} cannot be {repr(value)[:80]}: {error}") from error
    if values.pop("default_to_square", False) and isinstance(hf.get("size"), int):
        values["size"] = Size(*_pair(hf["size"]))
    values.pop("do_convert_rgb", None)
    values.pop("data_format", None)
    return values


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it is true or false")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LARGEST:
        raise ValueError("it is a positive integer")
    return value


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("it is a number")
    return float(value)


def _resample(value: object) -> int:
    if value not in list(Image.Resampling):
        raise ValueError(f"Pillow's filters are {', '.join(f'{filter:d}' for filter in Image.Resampling)}")
    return int(value)


def _size(value: object) -> Size:
    if isinstance(value, (list, tuple)):
        return Size(*_pair(value))
    if not isinstance(value, dict):
        return Size(shortest_edge=_side(value))
    size = Size(**{key: _count(edge) for key, edge in value.items() if edge is not None})
    if size.height and size.width:
        _side(size.height), _side(size.width)
    if size.given().keys() not in ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}):
        raise ValueError("it has height and width, or shortest_edge")
    return size


def _side(value: object) -> int:
    if _count(value) > MAX_SIDE:
        raise ValueError(f"a side has at most {MAX_SIDE} pixels")
    return value


def _pair(value: object) -> tuple[int, int]:
    """{"height", "width"}, a pair, or one number for both."""
    if isinstance(value, dict):
        value = [value.get("height"), value.get("width"), *(value.keys() - {"height", "width"})]
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return _side(height), _side(width)


def _triple(value: object) -> tuple[float, float, float]:
    red, green, blue = value if isinstance(value, (list, tuple)) else (value, value, value)
    return _number(red), _number(green), _number(blue)


def _divisors(value: object) -> tuple[float, float, float]:
    if 0.0 in _triple(value):
        raise ValueError("pixels are divided by it")
    return _triple(value)


def _pinpoints(value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("it is a list of (height, width)")
    return tuple(_pair(pair) for pair in value)


def _only(expected: object):
    def check(value: object) -> object:
        if value != expected:
            raise ValueError(f"only {expected!r} is supported")
        return value

    return check


PARSERS = {
    "do_resize": _flag, "do_center_crop": _flag, "do_rescale": _flag, "do_normalize": _flag, "do_pad": _flag,
    "size": _size, "crop_size": _pair, "resample": _resample, "rescale_factor": _number,
    "image_mean": _triple, "image_std": _divisors, "image_grid_pinpoints": _pinpoints,
    "max_image_tiles": _count, "min_pixels": _count, "max_pixels": _count,
    "patch_size": _count, "temporal_patch_size": _count, "merge_size": _count,
    "default_to_square": _flag,  # how an integer `size` is meant
    "do_convert_rgb": _only(True),  # open_image gives RGB
    "data_format": _only("channels_first"),
}  # fmt: skip
