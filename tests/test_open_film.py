"""Frames are those of a decode from end to end, whatever the container, the codec, and where its keyframes are."""

import gc
import io
import zlib

import av
import numpy as np
import pytest
from films import decode, picture, remux, write_film, write_sound
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from minivlm import open_film as module
from minivlm.errors import MinivlmError
from minivlm.open_film import Unsure, open_film
from minivlm.videos import FilmRule, open_video


def open_path(path, decode_all=False):
    data = path.read_bytes()
    return open_film(io.BytesIO(data), path.name, data[:512], decode_all)


def taken(reel, indices):
    return np.stack([np.asarray(frame) for frame in reel.take(indices)])


def error_of(path):
    with pytest.raises(MinivlmError) as caught:
        open_path(path)
    assert str(caught.value).isprintable() and path.name in str(caught.value)
    return str(caught.value)


KINDS = [
    (codec, suffix)
    for codec, suffixes in {
        "libx264": (".mp4", ".mkv", ".avi", ".ts", ".flv", ".h264"),
        "mpeg4": (".mp4", ".mov", ".mkv", ".avi"),
        "mpeg2video": (".mpg", ".ts"),
        "libx265": (".mp4",),
        "libvpx-vp9": (".webm",),
        "libvpx": (".webm",),
    }.items()
    if codec in av.codecs_available
    for suffix in suffixes
]


# ---- numbering


@given(
    kind=st.sampled_from(KINDS),
    num_frames=st.integers(8, 40),
    rate=st.sampled_from([24, 25, 30]),
    gop=st.integers(1, 30),
    b_frames=st.integers(0, 3),
    open_gop=st.booleans(),
    wanted=st.sets(st.integers(0, 39), min_size=1, max_size=6),
)
# Frames that are shown in another order than they are stored, keyframes side by side, frames stored behind a keyframe:
@example(kind=("libx264", ".avi"), num_frames=20, rate=25, gop=9, b_frames=2, open_gop=False, wanted={1, 2, 3})
@example(kind=("libx264", ".avi"), num_frames=20, rate=25, gop=3, b_frames=0, open_gop=False, wanted={5, 9})
@example(kind=("mpeg2video", ".ts"), num_frames=20, rate=25, gop=6, b_frames=2, open_gop=True, wanted={2, 3, 5})
def test_taken_frames_are_those_of_a_full_decode(
    tmp_path_factory, kind, num_frames, rate, gop, b_frames, open_gop, wanted
):
    codec, suffix = kind
    options = {"x264-params": f"open-gop={int(open_gop)}"} if codec == "libx264" else {}
    path = tmp_path_factory.mktemp("film") / f"film{suffix}"
    write_film(path, num_frames, codec, rate, gop, b_frames if "vpx" not in codec else 0, options=options)
    theirs = decode(path)
    indices = sorted(number for number in wanted if number < len(theirs)) or [0]
    reel = open_path(path)
    assert len(reel.times) == len(theirs) == num_frames
    assert np.array_equal(taken(reel, indices), theirs[indices])
    assert reel.fps == pytest.approx(rate, rel=0.01)
    if suffix != ".h264":  # which has no times
        assert reel.times == pytest.approx([number / rate for number in range(num_frames)], abs=2e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_numbering_by_decoding_gives_the_same_film(tmp_path, suffix):
    path = write_film(tmp_path / f"film{suffix}", 30, gop=7, b_frames=2)
    by_packets, by_decoding = open_path(path), open_path(path, decode_all=True)
    indices = [0, 6, 7, 20, 29]
    assert np.array_equal(taken(by_packets, indices), taken(by_decoding, indices))
    assert by_packets.times == pytest.approx(by_decoding.times) and by_packets.fps == pytest.approx(by_decoding.fps)


@pytest.mark.parametrize(
    ("suffix", "num_frames", "changes"),
    [
        (".mp4", 52, {"earlier": 8}),  # an edit list: 8 frames are decoded and not shown
        (".mp4", 60, {"options": {"movflags": "frag_keyframe+empty_moov"}}),  # no table of frames
        (".mkv", 60, {"options": {"live": "1"}}),  # no duration, no index
        (".ts", 38, {"drop": 14}),  # begins between keyframes: what comes before the first one is no frame
    ],
)
def test_films_that_were_cut_and_streamed_are_numbered_as_they_are_shown(tmp_path, suffix, num_frames, changes):
    film = write_film(tmp_path / "whole.mp4", 60, "libx264", b_frames=2)
    path = remux(film, tmp_path / f"film{suffix}", **changes)
    theirs, reel = decode(path), open_path(path)
    indices = [0, 1, 20, num_frames - 1]
    assert len(theirs) == len(reel.times) == num_frames and reel.fps == pytest.approx(25)
    assert np.array_equal(taken(reel, indices), theirs[indices])


@pytest.mark.parametrize("decode_all", [False, True])
def test_frames_that_were_taken_leave_the_memory_without_a_search(tmp_path, decode_all):
    reel = open_path(write_film(tmp_path / "film.mp4", 40, rotation=90), decode_all)
    gc.collect()
    gc.disable()
    try:
        for _ in reel.take(list(range(40))):
            pass
        left = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert left <= 1


def test_frames_of_one_time_are_told_apart(tmp_path):
    """The fourth says that it is shown when the third is."""
    path = tmp_path / "film.mkv"
    with av.open(str(write_film(tmp_path / "whole.mkv", 8, gop=1))) as whole, av.open(str(path), "w") as film:
        copy, earlier = film.add_stream_from_template(whole.streams.video[0]), 0
        for number, packet in enumerate(packet for packet in whole.demux(video=0) if packet.size):
            packet.pts = packet.dts = earlier if number == 3 else packet.pts
            earlier, packet.stream = packet.pts, copy
            film.mux(packet)
    theirs, reel = decode(path), open_path(path)
    assert reel.times == pytest.approx([number / 25 for number in range(8)])
    assert np.array_equal(taken(reel, [3]), theirs[[3]])


class CountingFile(io.BytesIO):
    num_bytes = 0

    def read(self, *size):
        data = super().read(*size)
        self.num_bytes += len(data)
        return data


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_late_frame_is_jumped_to(tmp_path, suffix):
    data = write_film(tmp_path / f"film{suffix}", 2000, "ffv1").read_bytes()
    file = CountingFile(data)
    reel = open_film(file, "film", data[:512])
    file.num_bytes = 0
    list(reel.take([1990]))
    assert 0 < file.num_bytes < len(data) / 2


class CountingDecoder:
    def __init__(self, codec, counts):
        self.codec, self.counts = codec, counts

    def decode(self, packet):
        frames = self.codec.decode(packet)
        self.counts.append(len(frames))
        return frames

    def flush_buffers(self):
        self.codec.flush_buffers()


def test_frames_that_a_film_hides_are_not_counted(tmp_path):
    """VP8's alternate references: packets of their own, which are decoded and never shown."""
    path = tmp_path / "film.webm"
    with av.open(str(write_film(tmp_path / "shown.webm", 12, "libvpx"))) as shown, av.open(str(path), "w") as film:
        copy = film.add_stream_from_template(shown.streams.video[0])
        for number, packet in enumerate(shown.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xFF if number != 5 else 0xEF  # its bit "show_frame"
                hidden = av.Packet(bytes(data))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.is_keyframe, hidden.stream = packet.is_keyframe, copy
                film.mux(hidden)
    theirs = decode(path)
    assert len(theirs) == len(open_path(path).times) == 11
    assert np.array_equal(taken(open_path(path), [3, 7, 10]), theirs[[3, 7, 10]])


def test_eight_frames_of_a_long_film_do_not_decode_it(tmp_path, monkeypatch):
    """2000 frames with a keyframe every 20th: 8 frames need 8 · 20 at the most, and not one is kept besides."""
    path = write_film(tmp_path / "film.mp4", 2000, gop=20)
    counts, decode_stretch = [], module._decode
    monkeypatch.setattr(module, "_decode", lambda p, codec, s: decode_stretch(p, CountingDecoder(codec, counts), s))
    indices = [13 + 250 * number for number in range(8)]
    reel = open_path(path)
    assert len(reel.times) == 2000 and not counts
    assert np.array_equal(taken(reel, indices), decode(path)[indices])
    assert 8 <= sum(counts) <= 8 * 20 and max(counts) < 30


def test_a_packet_that_breaks_its_promise_is_told(tmp_path, monkeypatch):
    path = write_film(tmp_path / "film.mp4", 12)
    reel = open_path(path)
    monkeypatch.setattr(CountingDecoder, "decode", lambda *_: [])
    decode_stretch = module._decode
    monkeypatch.setattr(module, "_decode", lambda p, codec, s: decode_stretch(p, CountingDecoder(codec, []), s))
    with pytest.raises(Unsure):
        list(reel.take([3]))


def test_uneven_times_are_kept(tmp_path):
    times = [0, 10, 20, 500, 1000, 1100, 3000, 3010, 3020, 5000]  # milliseconds
    path = write_film(tmp_path / "film.mkv", 10, "libx264", times=times)
    reel = open_path(path)
    assert reel.times == [time / 1000 for time in times]
    assert reel.fps == 9 / 5  # and not the 25 that the file may claim


def test_a_rate_that_the_frames_contradict_is_not_believed():
    class Stream:
        average_rate = 1000  # as browsers' recorders write

    assert module._rate(Stream, [0, 0.04, 0.08]) == pytest.approx(25)
    Stream.average_rate = 25.02
    assert module._rate(Stream, [0, 0.04, 0.08]) == 25.02
    assert module._rate(Stream, [0]) == 25.02


# ---- upright


@pytest.mark.parametrize(
    ("rotation", "corner"), [(0, (0, 0)), (90, (-1, 0)), (180, (-1, -1)), (270, (0, -1)), (-90, (0, -1))]
)
def test_films_are_turned_upright(tmp_path, rotation, corner):
    """Rotation is counterclockwise; the corner that was at the top left is red."""
    reel = open_path(write_film(tmp_path / "film.mp4", 3, rotation=rotation))
    _, frame = reel.take([0, 2])  # the first one says it for all
    assert frame.size == ((64, 48) if rotation % 180 == 0 else (48, 64))
    frame = np.asarray(frame).astype(int)
    reds = {(y, x): frame[y, x, 0] - frame[y, x, 1] > 100 for y in (0, -1) for x in (0, -1)}
    assert [where for where, red in reds.items() if red] == [corner]


def test_every_turn_and_mirror_is_what_its_matrix_says():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for (a, b, c, d), turn in module.TURNS.items():
        shown = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(2) for x in range(3)}
        left, top = (min(at[axis] for at in shown) for axis in (0, 1))
        ours = np.asarray(Image.fromarray(pixels).transpose(turn))
        assert all(ours[y - top, x - left] == value for (x, y), value in shown.items())


# ---- what is not a film, or not a whole one


def test_text_named_mp4_is_called_text(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_text("this is no film\n" * 9)
    assert "it looks like text ('this is no film" in error_of(path)


def test_a_playlist_opens_nothing(tmp_path):
    film = write_film(tmp_path / "film.ts", 30, "mpeg2video")
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{film}\n#EXT-X-ENDLIST\n")
    assert "looks like text" in error_of(path)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_not_a_film(tmp_path, cover):
    assert "has no pictures in it, only sound" in error_of(write_sound(tmp_path / "song.mp4", cover))


def test_an_empty_file_and_junk_are_told(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"")
    assert "looks like an empty file" in error_of(path)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    assert "nothing that is known here" in error_of(path)


def test_a_film_without_frames_is_told(tmp_path):
    assert "has no frame that can be decoded" in error_of(write_film(tmp_path / "film.avi", 0))


def test_an_mp4_that_lost_its_end_is_told(tmp_path):
    path = write_film(tmp_path / "film.mp4", 40)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "is a film (MP4 or MOV), but damaged or cut off" in error_of(path)


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mpeg4", ".mp4"), ("mpeg4", ".mkv"), ("mpeg4", ".avi"), ("libvpx-vp9", ".webm")]
)
def test_what_is_left_of_a_film_is_used_with_a_note(tmp_path, capsys, codec, suffix):
    path = write_film(
        tmp_path / f"film{suffix}", 100, codec, muxer={"movflags": "faststart"} if suffix == ".mp4" else {}
    )
    theirs = decode(path)
    data = path.read_bytes()
    assert len(open_path(path).times) == 100 and capsys.readouterr().err == ""
    path.write_bytes(data[: len(data) * 7 // 10])
    reel = open_path(path)
    last = len(reel.times) - 2  # the last packet may be half a frame
    assert 20 < last < 90
    assert np.array_equal(taken(reel, [0, last]), theirs[[0, last]])
    assert f"{path.name} is cut off: " in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.fixture(scope="module")
def small_films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    kinds = {".mp4": "libx264", ".mkv": "mpeg4", ".avi": "mpeg4", ".webm": "libvpx-vp9", ".mpg": "mpeg2video"}
    return [write_film(folder / f"film{suffix}", 12, codec).read_bytes() for suffix, codec in kinds.items()]


def assert_film_or_one_line(data: bytes, changes):
    """`changes`: where, as a share of the length; how many bytes go; what comes in their place."""
    for place, cut, new in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + cut :]
    try:
        film = open_video(data, {}, FilmRule())
        assert film.frames and film.indices[-1] < film.num_source_frames
    except MinivlmError as error:
        assert str(error).isprintable()


@given(
    which=st.integers(0, 4),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=20)), min_size=1, max_size=6),
)
def test_any_damaged_film_is_a_film_or_one_line(small_films, which, changes):
    assert_film_or_one_line(small_films[which], changes)


def test_pictures_of_an_unknown_kind_are_told(tmp_path):
    path = write_film(tmp_path / "film.mkv", 12)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_MPEG9/ISO/ASP"))
    assert "holds pictures that FFmpeg cannot decode" in error_of(path)


def test_a_bar_shows_where_this_takes_long(tmp_path, monkeypatch, capsys):
    path = write_film(tmp_path / "film.mkv", 12)
    open_path(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "BAR_SECONDS", 0)
    open_path(path)
    assert "reading the film: " in capsys.readouterr().err


def test_damage_in_the_middle_is_told(tmp_path, capsys):
    path = write_film(tmp_path / "film.mp4", 60, gop=60)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in list(container.demux(video=0))[20:24]:
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    assert 0 < len(open_path(path, decode_all=True).times) < 60
    assert f"{path.name} is damaged: " in (err := capsys.readouterr().err) and err.count("\n") == 1


# ---- animated pictures


@pytest.mark.parametrize(("kind", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animations_are_films(tmp_path, kind, options):
    frames = [Image.new("RGB", (20, 10), (number * 20, 0, 200)) for number in range(10)]
    path = tmp_path / f"film.{kind}"
    durations = [50] * 5 + [200] * 5  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)
    reel = open_path(path)
    assert reel.times == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.45, 0.65, 0.85, 1.05]) and reel.fps == 8
    ours = [frame.convert("RGB").getpixel((3, 3)) for frame in reel.take([0, 4, 9])]
    assert ours == [(0, 0, 200), (80, 0, 200), (180, 0, 200)]


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_half_an_animation_is_told(tmp_path, kind):
    frames = [Image.fromarray(picture(number)) for number in range(10)]
    path = tmp_path / f"film.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is damaged or cut off" in error_of(path)


@given(
    which=st.integers(0, 2),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=20)), min_size=1, max_size=4),
)
@pytest.mark.filterwarnings("error")  # Pillow warns of what it finds odd; the user is told by a film or by one line
def test_any_damaged_animation_is_a_film_or_one_line(small_animations, which, changes):
    assert_film_or_one_line(small_animations[which], changes)


@pytest.mark.filterwarnings("error")
def test_an_animation_that_pillow_warns_of_is_told_in_one_line(small_animations):
    (ten, none) = (b"acTL" + number.to_bytes(4, "big") + bytes(4) for number in (10, 0))  # frames
    ten, none = (chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in (ten, none))
    assert ten in small_animations[2]
    with pytest.raises(MinivlmError, match="is a picture, not a film"):
        open_video(small_animations[2].replace(ten, none), {}, FilmRule())
    with pytest.raises(MinivlmError, match="it looks like a damaged PNG picture"):
        open_video(small_animations[2].replace(b"IHDR", b"JHDR"), {}, FilmRule())


@pytest.fixture(scope="module")
def small_animations():
    frames = [Image.fromarray(picture(number)) for number in range(10)]
    files = [io.BytesIO() for _ in range(3)]
    for file, kind in zip(files, ("gif", "webp", "png"), strict=True):
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return [file.getvalue() for file in files]


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_frames_of_an_animation_that_are_taken_alone_are_those_of_the_whole(tmp_path, kind):
    """Each is stored as what changes from the one before."""
    whole = Image.new("RGB", (64, 48))
    frames = []
    for number in range(9):
        whole.paste((20 * number, 200, 90), (number * 6, 10, number * 6 + 9, 30))
        frames.append(whole.copy())
    path = tmp_path / f"film.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    for indices in ([8], [3, 7], [0, 1, 2]):
        (ours, theirs) = (list(open_path(path).take(numbers)) for numbers in (indices, range(9)))
        for index, frame in zip(indices, ours, strict=True):
            assert frame.convert("RGB").tobytes() == theirs[index].convert("RGB").tobytes() == frames[index].tobytes()


def test_a_picture_is_not_a_film(tmp_path):
    for kind, says in {"png": "is a picture, not a film", "jpg": "it looks like a JPEG picture"}.items():
        path = tmp_path / f"picture.{kind}"
        Image.fromarray(picture(0)).save(path)
        assert says in error_of(path)


def test_a_still_gif_is_a_film_of_one_frame(tmp_path):
    path = tmp_path / "picture.gif"
    Image.fromarray(picture(0)).save(path)
    assert open_path(path).times == [0]
