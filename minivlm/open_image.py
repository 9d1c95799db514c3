"""Opens one picture from wherever people have it, as upright RGB: what a person sees.

Adds to Pillow: URLs, data: URIs, arrays, limits against hostile files, and errors of one line that name the picture.
Does no preprocessing (images.py).
"""

import base64
import binascii
import http.client
import re
import time
import urllib.error
import urllib.request
import warnings
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, ImageOps

from minivlm.errors import MinivlmError

MAX_BYTES = 128 * 2**20  # bytes of a download or a data: URI
MAX_PIXELS = 178_956_970  # pixels (half a GiB as RGB): where Pillow raises by itself, said here for other inputs
URL_SECONDS = 30.0  # for a whole download; a silent server is given up after URL_SILENCE_SECONDS
URL_SILENCE_SECONDS = 10.0
# Formats that are decoded: no EPS (runs Ghostscript), no stubs, nothing without a magic number.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "BMP", "DIB", "TIFF", "PPM", "ICO", "QOI", "PSD")

Source = str | Path | bytes | Image.Image | np.ndarray


def open_image(source: Source) -> Image.Image:
    """-> upright RGB picture from a path, an http(s):// or file:// URL, a data: URI, the bytes of a file, a PIL
    image, or a uint8 array (height, width, 3).

    EXIF orientation is applied and transparency is composited on white, from a PIL image as from a file. Animations
    give their first frame. The rest converts as Pillow (so transformers) does; trap: 16-bit grey is clipped at 255,
    not scaled, so most such pictures turn out white.
    A PIL image is never changed in place, but may be returned itself when there is nothing to convert.
    Raises MinivlmError, one line that names the picture, for whatever is not a picture within MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        return _decode(lambda: source, f"the {source.mode} picture given", b"")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise MinivlmError(
                f"an array given as a picture must be uint8 (height, width, 3), not {source.dtype} {source.shape}"
            )
        return _decode(lambda: Image.fromarray(source), f"the {source.shape} array given", b"")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source), f"the {len(source)} bytes given")
    if isinstance(source, Path):
        return _open_file(source)
    if not isinstance(source, str):
        raise MinivlmError(
            f"a picture is given as a path, URL, bytes, PIL image or uint8 array, not as {type(source).__name__}"
        )
    if source.startswith("data:"):
        return _open_bytes(*_read_data_uri(source))
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", source)
    if scheme is None:
        return _open_file(Path(source))
    if scheme[1].lower() in ("http", "https"):
        return _open_bytes(download(source, MAX_BYTES), source)
    if scheme[1].lower() == "file":
        return _open_file(_path_of_file_url(source))
    raise MinivlmError(f"{one_line(source)}: only http, https, file and data URLs can be opened")


def _open_file(path: Path) -> Image.Image:
    try:
        if path.is_dir():
            raise MinivlmError(f"{one_line(path)} is a directory, not a picture")
        if not path.exists():
            raise MinivlmError(f"{one_line(path)}: no such file")
        if not path.is_file():
            raise MinivlmError(f"{one_line(path)} is not a regular file")
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            return _decode(lambda: Image.open(file, formats=_formats()), path, head)
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise MinivlmError(f"{one_line(path)} cannot be read: {one_line(error)}") from error


def _open_bytes(data: bytes, name: str) -> Image.Image:
    return _decode(lambda: Image.open(BytesIO(data), formats=_formats()), name, data[:512])


def _decode(opener, name: str | Path, head: bytes) -> Image.Image:
    """Runs `opener` and turns the picture upright and RGB; `head`: the file's first bytes, to say what else it is."""
    name = one_line(name)
    try:
        with warnings.catch_warnings():  # Pillow warns at half the pixels it refuses, and about odd metadata
            warnings.simplefilter("ignore")
            image = opener()
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            if 0 in image.size:
                raise MinivlmError(f"{name} has no pixels: it is {image.width} x {image.height}")
            image.load()
            return _to_rgb(_upright(image))
    except MinivlmError:
        raise
    except Image.UnidentifiedImageError as error:
        raise MinivlmError(
            f"{name} is not a picture that can be opened: it looks like {_what_it_looks_like(head)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise MinivlmError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels: shrink it first") from error
    except Exception as error:  # a damaged file raises nearly any exception in one of Pillow's decoders
        raise MinivlmError(f"{name} is damaged or incomplete: {one_line(error) or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    """EXIF orientation applied; unreadable EXIF counts as none, the pixels may still be good."""
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    except Exception:  # as above: the parser of damaged metadata raises nearly anything
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _formats() -> list[str]:
    """FORMATS that this Pillow knows; older ones have no AVIF."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _what_it_looks_like(head: bytes) -> str:
    """Says in words what the first bytes of a file that is no picture are."""
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        heic = head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
        return "a HEIC photo; save it as JPEG or PNG" if heic else "a film (MP4) or an AVIF picture"
    for start, what in _STARTS.items():
        if head.lower().lstrip().startswith(start):
            return what
    try:
        text = head[:508].decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8") if len(head) - error.start < 8 else ""
    if text.isprintable() or (text.split() and "".join(text.split()).isprintable()):
        return f"text ({one_line(text)[:40]!r})"
    return "something else, or a damaged picture"


_STARTS = {  # first bytes in lower case, spaces skipped
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing; export it as PNG",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x1a\x45\xdf\xa3": "a film (Matroska or WebM)",
}


def _read_data_uri(uri: str) -> tuple[bytes, str]:
    """RFC 2397, `data:[type][;base64],payload` -> the bytes, and a name without the payload for errors."""
    head, comma, payload = uri.partition(",")
    name = f"the data: URI ({one_line(head[5:]) or 'no media type'}, {len(payload)} characters)"
    if not comma:
        raise MinivlmError(f"{name} has no comma before its data")
    if len(payload) > 3 * MAX_BYTES:
        raise MinivlmError(f"{name} is larger than {MAX_BYTES // 2**20} MiB")
    data = unquote_to_bytes(payload)
    if head.lower().endswith(";base64"):
        data = b"".join(data.split())
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as error:
            raise MinivlmError(f"{name} is not valid base64: {one_line(error)}") from error
    return data, name


def _path_of_file_url(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MinivlmError(f"{one_line(url)}: a file:// URL has no host; write file:///path")
    return Path(urllib.request.url2pathname(parts.path))


def download(url: str, max_bytes: int) -> bytes:
    """-> what an http(s) URL holds: at most `max_bytes`, within URL_SECONDS, redirected only to http(s) and never from
    https to http."""
    deadline = time.monotonic() + URL_SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "minivlm"})  # some hosts refuse urllib's own name
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(request, timeout=URL_SILENCE_SECONDS) as response:
            chunks, length = [], 0
            while chunk := response.read1(2**16):
                length += len(chunk)
                if length > max_bytes:
                    raise MinivlmError(f"{one_line(url)} is larger than {max_bytes // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise MinivlmError(f"{one_line(url)} took longer than {URL_SECONDS:g} s")
                chunks.append(chunk)
            return b"".join(chunks)
    except urllib.error.HTTPError as error:
        raise MinivlmError(f"{one_line(url)}: the server answered {error.code} {one_line(error.reason)}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MinivlmError(f"{one_line(url)} cannot be read: {one_line(reason) or type(reason).__name__}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: PLR0913 - urllib's signature
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != old and (old, new) != ("http", "https"):
            raise MinivlmError(f"{one_line(req.full_url)} redirects from {old} to {new}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def one_line(text: object) -> str:
    """`text` for an error message: on one line, and short."""
    line = " ".join(str(text).split())
    return line if len(line) <= 160 else f"{line[:100]}...{line[-50:]}"
