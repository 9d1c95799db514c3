"""A film as people have it → the frames that a model looks at.

Adds to open_film.py, which knows what is in a file: where files come from, frames that are given as such, and sampling,
that is which of a film's frames are taken. What a frame becomes is images.py's and the families'.
"""

import math
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minivlm.errors import MinivlmError
from minivlm.files import one_line
from minivlm.image_config import LARGEST
from minivlm.open_film import Reel, Unsure, open_film, watched
from minivlm.open_image import open_image
from minivlm.sources import open_source

MAX_BYTES = 4 * 2**30  # bytes of a download, which goes to a temporary file
URL_SECONDS = 1800.0  # for a whole download

# What a part of a message may say of its film. `nframes` is `num_frames`; start and end are in seconds, both included.
FILM_OPTIONS = ("fps", "num_frames", "nframes", "video_start", "video_end")


@dataclass(frozen=True)
class FilmRule:
    """How a family samples a file when the message does not say: by `num_frames`, else by `fps`, else every frame."""

    num_frames: int | None = 8
    fps: float | None = None
    spacing: str = "arange"  # or "linspace", from the first frame to the last, as the original repositories do
    multiple_of: int = 1  # a count is rounded to a multiple of this (Qwen2-VL: 2)
    min_frames: int = 1  # of sampling by fps
    max_frames: int | None = None


@dataclass(frozen=True)
class Film:
    frames: list[Image.Image]  # RGB, upright, all of one size
    indices: list[int]  # their numbers in the source, from 0
    seconds: list[float] | None  # when they are shown, from the source's first frame; None for frames without a rate
    num_source_frames: int
    fps: float | None  # frames per second of the source, on average; None for frames that were given without


@dataclass
class KeptFilm:
    """A film's source that is opened once and remembers what was taken of it: a conversation shows it anew with every
    question, and `--dry-run` tells its frames. Who opens it first decides how."""

    source: object
    film: Film | None = None


def open_video(
    source: object, options: dict, rule: FilmRule, prepare: Callable[[Image.Image, int], Image.Image] = lambda f, _: f
) -> Film:
    """Opens and samples a film.

    `source`: a path, an http(s):// or file:// URL, a data: URI, the bytes of a file; or frames: a list of what
    `open_image` takes, or a uint8 array (frames, height, width, 3). A file is sampled by `options` (FILM_OPTIONS; null
    says nothing), else by `rule`. Frames are all taken unless `num_frames`, `video_start` or `video_end` say otherwise;
    `fps` tells how fast they follow each other, as in Qwen's messages.
    `prepare(frame, number of frames taken)`: applied to each frame as it is decoded, so that a long film of large
    frames is held at the size that the model sees.

    Raises MinivlmError, one line.
    """
    if isinstance(source, KeptFilm):
        source.film = source.film or open_video(source.source, options, rule, prepare)
        return source.film
    options = check_film_options(options)
    if isinstance(source, (list, tuple, np.ndarray)):
        return _given_frames(source, options, prepare)
    if not isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        raise MinivlmError(
            f"a film is a path, URL, list of frames or uint8 array (frames, height, width, 3), "
            f"not {type(source).__name__}"
        )
    file, name, head = open_source(source, "film", MAX_BYTES, URL_SECONDS, tempfile.TemporaryFile)
    with file:
        try:
            return _film(open_film(file, name, head), options, rule, prepare, name)
        except Unsure:
            return _film(open_film(file, name, head, decode_all=True), options, rule, prepare, name)


def check_film_options(options: dict) -> dict:
    """→ what is asked for, `nframes` as `num_frames`, null left out."""
    options = {key: value for key, value in options.items() if value is not None}
    for key, value in options.items():
        if key not in FILM_OPTIONS:
            raise MinivlmError(f"a film has the setting {key!r}; known here: {', '.join(FILM_OPTIONS)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
        told = one_line(repr(value), 80)
        if key in ("num_frames", "nframes") and not (number and value == int(value) and value >= 1):
            raise MinivlmError(f"{key} is a whole number of frames, at least 1, not {told}")
        if key == "fps" and not (number and value > 0):
            raise MinivlmError(f"fps is a number above 0, not {told}")
        if not number or value < 0:
            raise MinivlmError(f"{key} is a number of seconds, 0 or more, not {told}")
    given = [key for key in ("fps", "num_frames", "nframes") if key in options]
    if len(given) > 1:
        raise MinivlmError(f"a film is sampled by {given[0]} or by {given[1]}, not by both: leave one out")
    if "nframes" in options:
        options["num_frames"] = options.pop("nframes")
    if options.get("video_start", 0) > options.get("video_end", math.inf):
        raise MinivlmError(f"video_start, {options['video_start']} s, is after video_end, {options['video_end']} s")
    return options


def _given_frames(
    source: Sequence | np.ndarray, options: dict, prepare: Callable[[Image.Image, int], Image.Image]
) -> Film:
    """Frames as they are given."""
    if not len(source):
        raise MinivlmError("a film needs at least one frame; this list is empty")
    fps = options.pop("fps", None)
    if fps is None and options.keys() & {"video_start", "video_end"}:
        raise MinivlmError("video_start and video_end need fps, how fast the frames that are given follow each other")
    times = [number / (fps or 1) for number in range(len(source))]
    reel = Reel(times, fps, lambda indices: (open_image(source[index]) for index in indices))
    return _film(reel, options, FilmRule(num_frames=None), prepare, "the film")


def _film(
    reel: Reel, options: dict, rule: FilmRule, prepare: Callable[[Image.Image, int], Image.Image], name: str
) -> Film:
    start, end = options.get("video_start", 0), options.get("video_end", math.inf)
    first, after = bisect_left(reel.times, start), bisect_right(reel.times, end)
    if first >= after:
        until = "" if end == math.inf else f" until {end:g} s"
        raise MinivlmError(f"{name} has no frame from {start:g} s{until}: its last is shown at {reel.times[-1]:.2f} s")
    picked = sample(after - first, reel.fps, options, rule, name)
    indices = [first + number for number in picked]
    distinct = sorted(set(indices))
    pictures, full = {}, set()
    for index, taken in zip(distinct, watched(reel.take(distinct), "taking frames", len(distinct)), strict=True):
        picture = open_image(taken)
        full.add(picture.size)
        pictures[index] = prepare(picture, len(indices))
    frames = [pictures[index] for index in indices]
    if len({frame.size for frame in frames}) > 1:
        sizes = " and ".join(f"{height} x {width}" for width, height in sorted(full)[:2])
        raise MinivlmError(f"the frames of {name} differ in size, {sizes} pixels: a film has one size")
    seconds = None if reel.fps is None else [reel.times[index] for index in indices]
    return Film(frames, indices, seconds, len(reel.times), reel.fps)


def sample(n: int, source_fps: float | None, options: dict, rule: FilmRule, name: str = "the film") -> list[int]:
    """Which of `n` frames are taken, ascending.

    "arange" takes frame ⌊i · n / k⌋, i < k: transformers' `int(arange(0, n, n / k))` without the rounding that can
    make k + 1 frames of it, the last of which does not exist. "linspace" takes the first, the last and k - 2 between,
    and repeats frames where there are fewer than k. Both go by number, as in the reference, even where a film's rate
    varies.
    """
    k = _num_sampled(n, source_fps, options, rule, name)
    if rule.spacing == "linspace":
        return np.linspace(0, n - 1, k, dtype=int).tolist()
    return [i * n // k for i in range(k)]


def _num_sampled(n: int, source_fps: float | None, options: dict, rule: FilmRule, name: str) -> int:
    """What is asked for and more than there is, is an error, as in the reference; what `rule` asks for is not."""
    wanted = options.get("num_frames", None if "fps" in options else rule.num_frames)
    if wanted is not None:
        if "num_frames" in options and wanted > n:
            raise MinivlmError(f"{wanted:g} frames were asked for of {name}, which has {n} there: ask for no more")
        k = max(round(wanted / rule.multiple_of), 1) * rule.multiple_of
        return k if rule.spacing == "linspace" else min(k, n)
    fps = options.get("fps", rule.fps)
    if fps is None or source_fps is None:
        return n
    k = n / source_fps * fps
    if "fps" in options and int(k) > n and rule.max_frames is None:
        raise MinivlmError(f"{name} has {source_fps:.4g} frames per second, fewer than the {fps:g} asked for")
    k = min(max(k, rule.min_frames), rule.max_frames or n, n)
    return max(int(k) // rule.multiple_of * rule.multiple_of, 1)
