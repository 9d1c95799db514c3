"""Opens one picture from wherever people have it, as upright RGB.

Adds to Pillow: arrays, limits against hostile files, and errors of one line that name the picture. Where the bytes
come from is sources.py's; there is no preprocessing here (images.py).
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minivlm.errors import MinivlmError
from minivlm.files import one_line
from minivlm.sources import describe, open_source

MAX_BYTES = 128 * 2**20  # bytes of a download or a data: URI
MAX_PIXELS = 178_956_970  # pixels, half a GiB as RGB: where Pillow itself calls a file a decompression bomb
URL_SECONDS = 60.0  # for a whole download

# Formats that are decoded, where this Pillow knows them: none that runs another program (EPS) or has no magic number.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "JPEG2000", "BMP", "DIB", "TIFF", "PPM", "ICO", "QOI", "PSD")

EXIF_ORIENTATION = 0x0112


def open_image(source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """→ upright RGB picture from a path, an http(s):// or file:// URL, a data: URI, the bytes of a file, a PIL
    image, or a uint8 array (height, width, 3).

    EXIF orientation is applied and transparency is composited on white, from a PIL image as from a file: what a person
    sees. An animation gives its first frame. All else becomes RGB by Pillow's rule, as in transformers; trap: 16-bit
    grey is cut at 255, not scaled, so such a picture is mostly white.
    A PIL image is never changed, and may be returned itself when there is nothing to do.
    Raises MinivlmError, one line that names the picture and says what is wrong with it.
    """
    if isinstance(source, Image.Image):
        return _decode(lambda: source, f"the {source.mode} image given", b"")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise MinivlmError(f"a picture as an array is uint8 (height, width, 3), not {source.dtype} {source.shape}")
        return _decode(lambda: Image.fromarray(source), f"the array {source.shape} given", b"")
    if not isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        raise MinivlmError(f"a picture is a path, URL, bytes, PIL image or array, not {type(source).__name__}")
    file, name, head = open_source(source, "picture", MAX_BYTES, URL_SECONDS)
    with file:
        return _decode(lambda: Image.open(file, formats=_formats()), name, head)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decode(opener: Callable[[], Image.Image], name: str, head: bytes) -> Image.Image:
    """Runs `opener` and makes the picture upright RGB. `head`: the first bytes, to say what they are if no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, and from half the pixels that it refuses
            image = opener()
            height, width = image.height, image.width
            if height * width == 0:
                raise MinivlmError(f"{name} has no pixels: it is {height} x {width}")
            if height * width > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _to_rgb(_upright(image))
    except MinivlmError:
        raise
    except Image.UnidentifiedImageError as error:
        raise MinivlmError(f"{name} is not a picture that can be opened: it looks like {describe(head)}") from error
    except Image.DecompressionBombError as error:
        raise MinivlmError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels: shrink it first") from error
    except Exception as error:  # Pillow's decoders raise nearly any exception on a damaged file
        raise MinivlmError(f"{name} is damaged or cut off: {one_line(error) or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    """EXIF orientation applied. EXIF that cannot be read counts as none: the pixels may still be good."""
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # as above
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
