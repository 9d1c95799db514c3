"""Where pictures and films come from: a path, a URL, a data: URI or bytes → an open file, and a name for errors.

Knows nothing of pictures or films but how to say what a file is that is neither.
"""

import base64
import codecs
import http.client
import re
import time
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote_to_bytes, urlsplit

from tqdm import tqdm

from minivlm.errors import MinivlmError
from minivlm.files import one_line

SILENCE_SECONDS = 10.0  # that a server may leave us waiting
NAME = 160  # characters of a name that an error repeats; data: URIs are long
BAR_SECONDS = 2.0  # of waiting before a progress bar shows up


def open_source(
    source: str | Path | bytes, kind: str, max_bytes: int, max_seconds: float, scratch: Callable[[], BinaryIO] = BytesIO
) -> tuple[BinaryIO, str, bytes]:
    """→ (file at its start, its name for errors, its first bytes). `kind`: "picture" or "film", for errors.
    `max_bytes` of a download or data: URI, `max_seconds` of a download, which is written to what `scratch` makes."""
    file, name = _open(source, kind, max_bytes, max_seconds, scratch)
    try:
        head = file.read(512)
        file.seek(0)
    except OSError as error:
        raise MinivlmError(f"{name} cannot be read: {one_line(error)}") from error
    return file, name, head


def _open(
    source: str | Path | bytes, kind: str, max_bytes: int, max_seconds: float, scratch: Callable[[], BinaryIO]
) -> tuple[BinaryIO, str]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source), f"the data given ({len(source)} bytes)"
    if isinstance(source, Path):
        return _open_file(source, kind)
    if not source:
        raise MinivlmError(f"the name of a {kind} is empty: give a path or a URL")
    if source[:5].lower() == "data:":
        return _open_data_uri(source, max_bytes)
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", source.lower())
    if scheme is None:
        return _open_file(Path(source), kind)
    if scheme[1] in ("http", "https"):
        file = scratch()
        try:
            download(source, file, max_bytes, max_seconds)
        except MinivlmError:
            file.close()
            raise
        file.seek(0)
        return file, one_line(source, NAME)
    if scheme[1] == "file":
        return _open_file(_path_of_file_url(source), kind)
    raise MinivlmError(f"{one_line(source)}: only http, https, file and data URLs can be opened")


def _open_file(path: Path, kind: str) -> tuple[BinaryIO, str]:
    name = one_line(path, NAME)
    try:
        if not path.exists():
            raise MinivlmError(f"{name}: no such file")
        if not path.is_file():
            raise MinivlmError(f"{name} is a {'directory' if path.is_dir() else 'device'}, not a {kind}")
        return path.open("rb"), name
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise MinivlmError(f"{name} cannot be read: {one_line(error)}") from error


def _open_data_uri(uri: str, max_bytes: int) -> tuple[BinaryIO, str]:
    """RFC 2397, `data:[type][;base64],payload` → the bytes, and a name without the payload for errors."""
    head, comma, payload = uri.partition(",")
    name = f"the data: URI ({len(uri)} characters)"
    if not comma:
        raise MinivlmError(f"{name} has no comma before its data")
    if len(payload) > 2 * max_bytes:
        raise MinivlmError(f"{name} is larger than {max_bytes // 2**20} MiB")
    data = unquote_to_bytes(payload)
    if head.lower().endswith(";base64"):
        data = b"".join(data.split())
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except ValueError as error:
            raise MinivlmError(f"{name} is not valid base64: {one_line(error)}") from error
    return BytesIO(data), name


def _path_of_file_url(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MinivlmError(f"{one_line(url)}: a file URL names no host; write file:///path")
    return Path(urllib.request.url2pathname(parts.path))


def download(url: str, into: BinaryIO, max_bytes: int, max_seconds: float) -> None:
    """Writes what is behind an http(s) URL. Redirects may lead from http to https, and to no other scheme.
    Raises MinivlmError when that is more than `max_bytes`, takes more than `max_seconds`, or fails."""
    name, deadline = one_line(url, NAME), time.monotonic() + max_seconds
    try:
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII, as browsers show them
        request = urllib.request.Request(address, headers={"User-Agent": "minivlm"})  # urllib's own is often refused
        opener = urllib.request.build_opener(_Redirects)
        with (
            opener.open(request, timeout=SILENCE_SECONDS) as response,
            tqdm(desc="downloading", unit="B", unit_scale=True, leave=False, delay=BAR_SECONDS) as bar,
        ):
            num_bytes = 0
            while chunk := response.read1(2**16):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise MinivlmError(f"{name} is larger than {max_bytes / 2**20:g} MiB")
                if time.monotonic() > deadline:
                    raise MinivlmError(f"{name} took longer than {max_seconds:g} seconds")
                into.write(chunk)
                bar.update(len(chunk))
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


# ---- saying what a file is that cannot be opened

_STARTS = {  # first bytes; leading spaces and case do not count
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


def describe(head: bytes) -> str:
    """What a file looks like by its first bytes."""
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIC:
            return "a HEIC photo; save it as JPEG or PNG"
        return "an AVIF picture; save it as PNG" if head[8:12] in (b"avif", b"avis") else "a film (MP4 or MOV)"
    for start, what in _STARTS.items():
        if head.lstrip().lower().startswith(start.lower()):
            return what
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return "nothing that is known here"
    is_text = "".join(text.split()).isprintable()
    return f"text ({one_line(text)[:40]!r})" if is_text else "nothing that is known here"
