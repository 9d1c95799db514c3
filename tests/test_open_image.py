"""open_image: every odd file opens as a person sees it, and every other source is refused in one line."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from minivlm import open_image as module
from minivlm.errors import MinivlmError
from minivlm.open_image import open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # (height, width, 3)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference(image):
    """What transformers' PIL processors make of a picture, with the EXIF orientation that its load_image applies."""
    return convert_to_rgb(ImageOps.exif_transpose(image), return_numpy=True)


def error_of(source):
    with pytest.raises(MinivlmError) as caught:
        open_image(source)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


# ---- sources


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a b.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_open_image_takes_every_kind_of_source(png):
    data = png.read_bytes()
    encoded = base64.b64encode(data).decode()
    sources = [
        png,
        str(png),
        png.as_uri(),
        "file://localhost" + png.as_uri()[7:],
        data,
        bytearray(data),
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[:, ::-1][:, ::-1],
        f"data:image/png;base64,{encoded}",
        f"DATA:;BASE64,{encoded.rstrip('=')}",
        f"data:image/png;base64,{encoded[:20]}\n {encoded[20:]}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
    ]
    for source in sources:
        ours = open_image(source)
        assert ours.mode == "RGB"
        assert np.array_equal(np.asarray(ours), PIXELS), str(source)[:60]


def test_open_image_accepts_relative_paths(png, monkeypatch):
    monkeypatch.chdir(png.parent)
    assert np.array_equal(np.asarray(open_image("a b.png")), PIXELS)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "not NoneType"),
        (3, "not int"),
        ("", "the name of a picture is empty"),
        ("nowhere/cat.jpg", "nowhere/cat.jpg: no such file"),
        (Path("nowhere.jpg"), "no such file"),
        ("cat\0.jpg", "cat"),
        ("x" * 5000, "xxx...xxx"),
        ("two\nlines.jpg", "two lines.jpg: no such file"),
        ("red\x1b[31m.jpg", "red?[31m.jpg: no such file"),
        ("ftp://host/cat.jpg", "only http, https, file and data"),
        ("file://host/cat.jpg", "names no host"),
        ("file:///nowhere/cat.jpg", "no such file"),
        ("http://", "http://"),
        ("http://127.0.0.1:99999/cat.jpg", "cannot be read"),
        ("http://[::1/cat.jpg", "cannot be read"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,?", "not valid base64"),
        ("data:,", "an empty file"),
        (b"", "an empty file"),
        (PIXELS.astype(np.float32), "not float32 (5, 7, 3)"),
        (PIXELS[..., 0], "not uint8 (5, 7)"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
        (Image.new("RGB", (0, 3)), "no pixels"),
    ],
)
def test_open_image_refuses_other_sources_in_one_line(source, says):
    assert says in error_of(source)


def test_open_image_names_what_is_in_the_way(tmp_path, monkeypatch):
    assert "is a directory" in error_of(tmp_path)
    assert "is a device" in error_of("/dev/null")
    path = tmp_path / "cat.png"
    path.write_bytes(encode(Image.fromarray(PIXELS)))
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "cat.png cannot be read: [Errno 13] Permission denied" in error_of(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Dear diary,\n\ttoday I ate", "text ('Dear diary, today I ate')"),
        ("grüße ".encode() * 200, "text ('grüße"),
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo; save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a film (MP4 or MOV)"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"<svg xmlns='...'>", "an SVG drawing"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"PK\x03\x04 ...", "a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text ("),
        (bytes(range(128, 256)), "nothing that is known"),
        (b"\x89PNG, once", "a damaged PNG picture"),
    ],
)
def test_open_image_says_what_a_misnamed_file_is(tmp_path, content, says):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path} is not a picture that can be opened: it looks like {says}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_open_image_refuses_truncated_files(kind, tmp_path):
    path = tmp_path / "cat.png"
    data = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    path.write_bytes(data[: len(data) // 2])
    assert error_of(path).startswith(str(path))


# ---- what a person sees


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_open_image_applies_exif_orientation(orientation, kind):
    stored = {  # how upright pixels lie in a file of that orientation
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](PIXELS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    given_pil = Image.open(io.BytesIO(data))
    for ours in (open_image(data), open_image(given_pil), open_image(open_image(data))):
        assert np.array_equal(np.asarray(ours), PIXELS)
    assert np.array_equal(np.asarray(given_pil), np.asarray(Image.open(io.BytesIO(data)))), "the caller's was changed"


def test_open_image_survives_damaged_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(PIXELS), "WEBP", exif=exif.tobytes()[:20] + b"\xff" * 9, lossless=True)
    assert np.array_equal(np.asarray(open_image(data)), PIXELS)


def odd_pictures():
    """Pictures of every mode that files come in, as (name, PIL image)."""
    rgb = Image.fromarray(PIXELS)
    alpha = Image.fromarray(RNG.integers(0, 256, (5, 7), dtype=np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(6)
    clear_palette = palette.copy()
    clear_palette.info["transparency"] = 2
    keyed = rgb.copy()
    keyed.info["transparency"] = tuple(int(v) for v in PIXELS[2, 3])
    deep = Image.fromarray(RNG.integers(0, 700, (5, 7)).astype(np.uint16))
    pictures = {
        "RGB": rgb, "L": rgb.convert("L"), "1": rgb.convert("1"), "P": palette, "CMYK": rgb.convert("CMYK"),
        "RGBA": rgba, "LA": rgba.convert("LA"), "PA": rgba.convert("PA"), "P clear": clear_palette, "RGB key": keyed,
        "I;16": deep, "I": deep.convert("I"), "F": deep.convert("F"), "YCbCr": rgb.convert("YCbCr"),
        "1 x 1": rgb.resize((1, 1)), "1 x 20000": rgb.resize((20000, 1)), "20000 x 1": rgb.resize((1, 20000)),
    }  # fmt: skip
    return pictures.items()


@pytest.mark.parametrize(("name", "image"), odd_pictures(), ids=lambda value: str(value)[:9])
def test_open_image_equals_the_reference_in_every_mode(name, image):
    ours, theirs = np.asarray(open_image(image)), reference(image)
    assert ours.shape == (image.height, image.width, 3)
    assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("PNG", ["RGB", "L", "1", "P", "RGBA", "LA", "P clear", "RGB key", "I;16", "1 x 1", "1 x 20000"]),
        ("JPEG", ["RGB", "L", "CMYK", "20000 x 1"]),
        ("GIF", ["L", "P", "P clear"]),
        ("TIFF", ["RGB", "CMYK", "RGBA", "I;16", "F", "1"]),
        ("WEBP", ["RGB", "RGBA"]),
        ("BMP", ["RGB", "P", "1"]),
        ("PPM", ["RGB", "L"]),
        ("ICO", ["RGBA"]),
        ("JPEG2000", ["RGB", "RGBA"]),
        ("QOI", ["RGB", "RGBA"]),
    ],
)
def test_open_image_equals_the_reference_from_every_kind_of_file(kind, names):
    Image.init()
    if kind not in Image.SAVE:  # older Pillow
        names = []
    options = {"sizes": [(7, 5)]} if kind == "ICO" else {}  # its own begin at 16 x 16
    for name in names:
        data = encode(dict(odd_pictures())[name], kind, **options)
        assert np.array_equal(np.asarray(open_image(data)), reference(Image.open(io.BytesIO(data)))), name


def test_open_image_composites_on_white():
    half_red = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert open_image(half_red).getpixel((0, 0)) == (255, 127, 127)
    assert half_red.convert("RGB").getpixel((0, 0)) == (255, 0, 0), "the trap: dropping alpha shows what it hid"


def test_open_image_cuts_16_bit_grey_as_pillow_does():
    deep = Image.fromarray(np.array([[0, 200, 255, 256, 65535]], dtype=np.uint16))
    assert np.asarray(open_image(encode(deep)))[0, :, 0].tolist() == [0, 200, 255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_open_image_takes_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_open_image_does_not_copy_or_change_what_needs_nothing():
    image = Image.fromarray(PIXELS)
    assert open_image(image) is image


def test_open_image_leaves_no_file_open(png):
    image = open_image(png)
    png.unlink()
    assert np.array_equal(np.asarray(open_image(image.copy())), PIXELS)
    assert np.array_equal(np.asarray(open_image(image)), PIXELS)


# ---- limits


def png_of_size(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_open_image_refuses_decompression_bombs(monkeypatch):
    assert "more than 178 million pixels" in error_of(png_of_size(30_000, 30_000))
    gif = b"GIF89a" + b"\xff" * 4 + b"\x80\0\0" + b"\0" * 6 + b",\0\0\0\0" + b"\xff" * 4 + b"\0\2\2\x4c\1\0;"
    assert "more than 178 million pixels" in error_of(gif)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries leave it
    assert "more than 178 million pixels" in error_of(png_of_size(30_000, 30_000))


def test_open_image_opens_a_photo_of_40_megapixels(recwarn):
    data = encode(Image.new("L", (7360, 5520), 90), "JPEG")
    ours = open_image(data)
    assert (ours.size, ours.getpixel((7000, 5000))) == ((7360, 5520), (90, 90, 90))
    assert not recwarn.list


FILES = [encode(Image.fromarray(PIXELS), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")] + [
    encode(dict(odd_pictures())["P clear"], "PNG"),
    encode(dict(odd_pictures())["RGBA"], "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.2, 2.0),
)
def test_open_image_gives_a_picture_or_one_line_for_any_mutated_file(data, changes, kept):
    mutated = bytearray(data[: int(len(data) * kept)])
    for place, byte in changes:
        mutated[int(place * len(mutated))] = byte
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_PIXELS", 10**6)  # a mutated header may ask for half a GiB: true, and slow
        try:
            assert open_image(bytes(mutated)).mode == "RGB"
        except MinivlmError as error:
            assert str(error).isprintable()


@given(st.one_of(st.text(), st.text().map("data:".__add__), st.text().map("http://127.0.0.1:1/".__add__)))
def test_open_image_gives_one_line_for_any_string(source):
    try:
        open_image(source)
    except MinivlmError as error:
        assert str(error).isprintable()
