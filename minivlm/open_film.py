"""A film's file → when each of its frames is shown, and those of its frames that are asked for.

Adds to PyAV: exact frame numbers at the price of reading the file, not of decoding it. The file's packets (compressed
frames, in decoding order) are listed first. In nearly every film one packet is one frame and carries the time at which
it is shown, so that sorting these times numbers the frames; headers that claim a count or a rate are not trusted. A
frame is then decoded from the last keyframe before it, and the rest of the film is not. Films whose packets do not tell
are decoded from end to end, twice, one frame in memory at a time: once to count, once to take.

Animated GIF, WebP and PNG are Pillow's. Does no sampling (videos.py), hears no sound, and leaves pixels that are not
square as they are stored, as the reference does.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from PIL import Image, ImageSequence
from tqdm import tqdm

from minivlm.console import note_once
from minivlm.errors import MinivlmError
from minivlm.files import one_line
from minivlm.sources import BAR_SECONDS, describe

# Containers that are opened: none that is a list of other files (HLS, concat), for those may lie anywhere. The sounds
# are here so that it can be said what they are.
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,obu,mjpeg,nut,mxf,wav,mp3,flac,aac"
JUMPS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")  # in these every packet has its time written beside it
HIDES_FRAMES = ("vp8",)  # codecs with packets that are decoded and never shown
COVER = 0x400  # AV_DISPOSITION_ATTACHED_PIC
STILL_MILLISECONDS = 100  # that a frame of an animation is shown whose duration is 0, as browsers do

# Display matrix (a, b, c, d), signs only, which shows the pixel (x, y) at (a x + c y, b x + d y), y downwards.
TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Reel:
    """A film before it is sampled."""

    times: list[float]  # seconds from the first frame at which each frame is shown, ascending
    fps: float | None  # frames per second, on average; None for a single frame that does not say
    take: Callable[[list[int]], Iterator[Image.Image]]  # distinct ascending frame numbers → pictures; may raise Unsure


class Unsure(Exception):
    """A packet did not become the frame that it promised: open the film again, with `decode_all`."""


def open_film(file: BinaryIO, name: str, head: bytes, decode_all: bool = False) -> Reel:
    """`name`: for errors and notes. `head`: the first bytes. `decode_all`: number the frames by decoding every one.

    Raises MinivlmError, one line, where there is no frame to be had. A film whose end is missing is used as far as it
    goes, with a note on stderr.
    """
    if head.startswith((b"GIF8", b"\x89PNG")) or head[8:12] == b"WEBP":
        return _open_animation(file, name, head)
    try:
        with _container(file) as container:
            places = _list_packets(container, _stream(container, name), name, decode_all)
            reel = _read_frames(file, name) if places is None else _index(file, container, places)
    except (av.FFmpegError, OSError) as error:
        raise MinivlmError(_complaint(name, head, error)) from error
    if not reel.times:
        raise MinivlmError(f"{name} has no frame that can be decoded: it is empty, damaged or cut off")
    return reel


def _container(file: BinaryIO):
    """Trap: as `options` the list would go to every stream, too, and PyAV's older versions write beyond their table of
    streams where these appear one by one (MPEG, FLV)."""
    file.seek(0)
    return av.open(file, metadata_errors="replace", container_options={"format_whitelist": FORMATS})


def _stream(container, name: str = ""):
    """The first stream of pictures that is no cover of an album."""
    for stream in container.streams.video:
        if not stream.disposition.value & COVER:
            if stream.codec_context is None:
                raise MinivlmError(f"{name} holds pictures that FFmpeg cannot decode: save it as MP4 (H.264)")
            stream.thread_type = "AUTO"
            return stream
    raise MinivlmError(f"{name} has no pictures in it, only {'sound' if container.streams.audio else 'other data'}")


def _complaint(name: str, head: bytes, error: av.FFmpegError | OSError) -> str:
    what = describe(head).replace("damaged ", "")
    if what.startswith(("a film", "an AVI")):
        return f"{name} is {what}, but damaged or cut off ({one_line(error.strerror)}): fetch it again"
    return f"{name} is not a film that can be opened: it looks like {what}"


def _pictures(frames: Iterator[av.VideoFrame]) -> Iterator[Image.Image]:
    """RGB, turned as the first frame says (telephones film upright by a note in the file).

    Trap: a frame that is asked for its side data is part of a cycle from then on, and stays in memory until Python
    looks for these."""
    turn = None
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
        matrix = frame.side_data.get("DISPLAYMATRIX") if number == 0 else None
        if matrix is not None:
            a, b, _, c, d = np.sign(np.frombuffer(matrix, np.int32)[:5]).tolist()
            turn = TURNS.get((a, b, c, d))
        yield picture if turn is None else picture.transpose(turn)


def _rate(stream, times: list[float]) -> float | None:
    """The rate that the file declares, unless the times of its frames say something else."""
    declared = float(stream.average_rate or 0) or None
    if len(times) < 2:
        return declared
    measured = (len(times) - 1) / (times[-1] - times[0])
    return declared if declared and abs(declared / measured - 1) < 0.05 else measured


# ---- numbering frames by their packets


class _Key(NamedTuple):
    """A keyframe: decoding can begin here."""

    number: int  # of its packet, in decoding order
    pts: int  # when it is shown, in the stream's time base
    seek: int  # where to jump to, the same or a little before: demuxers seek by decoding times


class _Place(NamedTuple):
    """Where a frame is in the file."""

    number: int  # of its packet, in decoding order; what it is predicted from comes before
    pts: int
    key: _Key


class _Stretch(NamedTuple):
    """Packets that are decoded without a gap, `key` to `last`, and when the frames that are taken of them are shown."""

    key: _Key
    last: _Place
    wanted: list[int]


def _list_packets(container, stream, name: str, decode_all: bool) -> list[_Place] | None:
    """The film's frames in the order of their showing; None where the packets do not tell.

    Reads the whole file, its sound too, and notes on stderr if that ends before the time that the header promises.
    """
    is_avi = container.format.name == "avi"  # which does not say when a frame is shown: B-frames are out of order there
    hides = stream.codec_context.name in HIDES_FRAMES
    tells = not (decode_all or hides or (is_avi and stream.codec_context.has_b_frames))
    times, places = set(), []
    key = earlier = None
    end = 0.0  # seconds
    for packet in watched(_until_damage(container.demux()), "reading the film"):
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream or not packet.size:
            continue
        if packet.pts is None or packet.pts in times:
            tells = False
        if not tells:
            continue
        if packet.is_keyframe:
            seek = packet.pts if packet.dts is None else min(packet.dts, packet.pts)
            earlier, key = key, _Key(len(times), packet.pts, seek)
        start = key if key and packet.pts >= key.pts else earlier  # a B-frame may be shown before its keyframe
        if start is not None and not packet.is_discard:  # without a keyframe it is no frame
            places.append(_Place(len(times), packet.pts, start))
        times.add(packet.pts)
    promised = ((container.start_time or 0) + (container.duration or 0)) / av.time_base
    if is_avi and stream.average_rate:  # FFmpeg has corrected the duration of a shortened AVI without a word
        promised = float(stream.frames / stream.average_rate)
    if not decode_all and end and promised - end > max(0.5, 0.02 * promised):
        note_once(f"{name} is cut off: {end:.1f} of its {promised:.1f} seconds are there, and are used")
    return sorted(places, key=lambda place: place.pts) if tells else None


def _index(file: BinaryIO, container, places: list[_Place]) -> Reel:
    stream = _stream(container)
    times = [float((place.pts - places[0].pts) * stream.time_base) for place in places]

    def frames(indices: list[int]) -> Iterator[av.VideoFrame]:
        with _container(file) as container:
            stream = _stream(container)
            packets = container.demux(stream)
            for stretch in _stretches([places[index] for index in indices]):
                if container.format.name in JUMPS:
                    container.seek(stretch.key.seek, stream=stream)
                    packets = container.demux(stream)
                yield from _decode(packets, stream.codec_context, stretch)

    return Reel(times, _rate(stream, times), lambda indices: _pictures(frames(indices)))


def _stretches(places: list[_Place]) -> list[_Stretch]:
    """What has to be decoded for these frames, in decoding order."""
    found: list[_Stretch] = []
    for place in sorted(places, key=lambda place: (place.key, place)):
        if found and place.key.number <= found[-1].last.number:
            begun = found.pop()
            found.append(_Stretch(begun.key, max(begun.last, place), [*begun.wanted, place.pts]))
        else:
            found.append(_Stretch(place.key, place, [place.pts]))
    return found


def _decode(packets: Iterator, codec, stretch: _Stretch) -> Iterator[av.VideoFrame]:
    """The frames of one stretch, as they are shown. Leaves `packets` after its last packet, and the decoder empty."""
    wanted = sorted(stretch.wanted)
    try:
        for packet in dropwhile(lambda packet: packet.pts != stretch.key.pts, packets):
            frames = codec.decode(packet)
            if packet.pts == stretch.last.pts:
                frames += codec.decode(None)  # what it still holds back, to bring frames into order
                codec.flush_buffers()
            for frame in frames:
                if wanted and frame.pts == wanted[0]:
                    yield frame
                    del wanted[0]
            if packet.pts == stretch.last.pts:
                break
    except av.FFmpegError as error:
        raise Unsure from error
    if wanted:
        raise Unsure


# ---- numbering frames by decoding them


def _read_frames(file: BinaryIO, name: str) -> Reel:
    damaged = []
    times = [frame.time for frame in watched(_every_frame(file, damaged), "counting frames")]
    if damaged:
        note_once(f"{name} is damaged: {len(damaged)} of its packets cannot be decoded, and are left out")
    with _container(file) as container:
        stream = _stream(container)
        told = None not in times and all(a < b for a, b in zip(times, times[1:], strict=False))
        if told:
            times = [time - times[0] for time in times]
        else:
            rate = float(stream.average_rate or stream.base_rate or 25)
            times = [number / rate for number in range(len(times))]

        def frames(indices: list[int]) -> Iterator[av.VideoFrame]:
            waiting = iter(indices)
            index = next(waiting)
            for number, frame in enumerate(_every_frame(file, [])):
                if number == index:
                    yield frame
                    index = next(waiting, None)
                    if index is None:
                        return

        return Reel(times, _rate(stream, times), lambda indices: _pictures(frames(indices)))


def _every_frame(file: BinaryIO, damaged: list) -> Iterator[av.VideoFrame]:
    """Appends to `damaged` for every packet that cannot be decoded."""
    with _container(file) as container:
        for packet in _until_damage(container.demux(_stream(container))):
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                damaged.append(error)


def _until_damage(packets: Iterator) -> Iterator:
    """A file that is cut off may end in an error: what comes before is good."""
    try:
        yield from packets
    except av.FFmpegError:
        return


def watched(items: Iterator, what: str, total: int | None = None) -> Iterator:
    """A progress bar on stderr, if this takes long."""
    return tqdm(items, what, total, unit="", leave=False, delay=BAR_SECONDS)


# ---- animated pictures


def _open_animation(file: BinaryIO, name: str, head: bytes) -> Reel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and of many pixels: what matters is whether frames come
            image = Image.open(file, formats=("GIF", "WEBP", "PNG"))
            ends = [0]  # milliseconds
            for frame in ImageSequence.Iterator(image):
                frame.load()  # a WebP's duration is known only then
                ends.append(ends[-1] + (frame.info.get("duration", 0) or STILL_MILLISECONDS))
    except Image.UnidentifiedImageError as error:
        raise MinivlmError(f"{name} cannot be opened: it looks like {describe(head)}") from error
    except Exception as error:  # Pillow's decoders raise nearly any exception on a damaged file
        raise MinivlmError(f"{name} is damaged or cut off: {one_line(error) or type(error).__name__}") from error
    if image.format == "PNG" and len(ends) == 2:
        raise MinivlmError(f"{name} is a picture, not a film: give it as an image")

    def take(indices: list[int]) -> Iterator[Image.Image]:
        for index in indices:
            image.seek(index)
            yield image.copy()

    return Reel([end / 1000 for end in ends[:-1]], 1000 * (len(ends) - 1) / ends[-1], take)
