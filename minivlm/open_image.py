"""Opens one picture from wherever people have it, as upright RGB.

Adds to Pillow: URLs, data: URIs, arrays, limits against hostile files, and errors of one line that name the picture.
Does no preprocessing (images.py).
"""

import base64
import codecs
import http.client
import re
import time
import urllib.request
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, ImageOps

from minivlm.errors import MinivlmError
from minivlm.files import one_line

MAX_BYTES = 128 * 2**20  # bytes of a download or a data: URI
MAX_PIXELS = 178_956_970  # pixels, half a GiB as RGB: where Pillow itself calls a file a decompression bomb
URL_SECONDS = 60.0  # for a whole download
SILENCE_SECONDS = 10.0  # that a server may leave us waiting
NAME = 160  # characters of a name that an error repeats; data: URIs are long

# Formats that are decoded, where this Pillow knows them: none that runs another program (EPS) or has no magic number.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "JPEG2000", "BMP", "DIB", "TIFF", "PPM", "ICO", "QOI", "PSD")

EXIF_ORIENTATION = 0x0112


def open_image(source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """-> upright RGB picture from a path, an http(s):// or file:// URL, a data: URI, the bytes of a file, a PIL
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
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source), f"the data given ({len(source)} bytes)")
    if isinstance(source, Path):
        return _open_file(source)
    if not isinstance(source, str):
        raise MinivlmError(f"a picture is a path, URL, bytes, PIL image or array, not {type(source).__name__}")
    if source[:5].lower() == "data:":
        return _open_bytes(*_read_data_uri(source))
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", source.lower())
    if scheme is None:
        return _open_file(Path(source))
    if scheme[1] in ("http", "https"):
        return _open_bytes(download(source, MAX_BYTES), source)
    if scheme[1] == "file":
        return _open_file(_path_of_file_url(source))
    raise MinivlmError(f"{one_line(source)}: only http, https, file and data URLs can be opened")


def _open_file(path: Path) -> Image.Image:
    name = one_line(path, NAME)
    try:
        if not path.exists():
            raise MinivlmError(f"{name}: no such file")
        if not path.is_file():
            raise MinivlmError(f"{name} is a {'directory' if path.is_dir() else 'device'}, not a picture")
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            return _decode(lambda: Image.open(file, formats=_formats()), name, head)
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise MinivlmError(f"{name} cannot be read: {one_line(error)}") from error


def _open_bytes(data: bytes, name: str) -> Image.Image:
    return _decode(lambda: Image.open(BytesIO(data), formats=_formats()), one_line(name, NAME), data[:512])


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
        raise MinivlmError(f"{name} is not a picture that can be opened: it looks like {_describe(head)}") from error
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


# ---- saying what a file is that is no picture

_STARTS = {  # first bytes, leading spaces skipped, in lower case
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing; export it as PNG",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"%pdf": "a PDF document; export the page as PNG",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1a\x45\xdf\xa3": "a film (WebM or Matroska)",
    b"riff": "an AVI film, a WAV sound or a damaged WebP picture",
    b"\x89png": "a damaged PNG picture",
    b"\xff\xd8\xff": "a damaged JPEG picture",
    b"gif8": "a damaged GIF picture",
}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _describe(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIC:
            return "a HEIC photo; save it as JPEG or PNG"
        return "an AVIF picture; save it as PNG" if head[8:12] in (b"avif", b"avis") else "a film (MP4 or MOV)"
    for start, what in _STARTS.items():
        if head.lstrip().lower().startswith(start):
            return what
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return "nothing that is known here"
    is_text = "".join(text.split()).isprintable()
    return f"text ({one_line(text)[:40]!r})" if is_text else "nothing that is known here"


# ---- where bytes come from


def _read_data_uri(uri: str) -> tuple[bytes, str]:
    """RFC 2397, `data:[type][;base64],payload` -> the bytes, and a name without the payload for errors."""
    head, comma, payload = uri.partition(",")
    name = f"the data: URI ({len(uri)} characters)"
    if not comma:
        raise MinivlmError(f"{name} has no comma before its data")
    if len(payload) > 2 * MAX_BYTES:
        raise MinivlmError(f"{name} is larger than {MAX_BYTES // 2**20} MiB")
    data = unquote_to_bytes(payload)
    if head.lower().endswith(";base64"):
        data = b"".join(data.split())
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise MinivlmError(f"{name} is not valid base64: {one_line(error)}") from error
    return data, name


def _path_of_file_url(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MinivlmError(f"{one_line(url)}: a file URL names no host; write file:///path")
    return Path(urllib.request.url2pathname(parts.path))


def download(url: str, max_bytes: int) -> bytes:
    """-> what is behind an http(s) URL. Redirects may lead from http to https, and to no other scheme.
    Raises MinivlmError when that is more than `max_bytes`, takes more than URL_SECONDS, or fails."""
    name, deadline = one_line(url, NAME), time.monotonic() + URL_SECONDS
    try:
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII, as browsers show them
        request = urllib.request.Request(address, headers={"User-Agent": "minivlm"})  # urllib's own is often refused
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(request, timeout=SILENCE_SECONDS) as response:
            data = bytearray()
            while chunk := response.read1(2**16):
                data += chunk
                if len(data) > max_bytes:
                    raise MinivlmError(f"{name} is larger than {max_bytes / 2**20:g} MiB")
                if time.monotonic() > deadline:
                    raise MinivlmError(f"{name} took longer than {URL_SECONDS:g} seconds")
            return bytes(data)
    except HTTPError as error:
        error.close()
        raise MinivlmError(f"{name}: the server answered {error.code} {one_line(error.reason)}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise MinivlmError(f"{name} cannot be read: {one_line(reason) or type(reason).__name__}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != old and (old, new) != ("http", "https"):
            raise MinivlmError(f"{one_line(req.full_url)} redirects from {old} to {new}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
