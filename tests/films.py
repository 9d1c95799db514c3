"""Small films, written with PyAV where the tests run. Frame i can be told from the others by its pixels."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (48, 64)  # height, width


def picture(number, size=SIZE):
    """(height, width, 3) uint8: a grey of its own, a bar that moves, and a red corner at the top left."""
    height, width = size
    pixels = np.full((height, width, 3), 40 + number * 7 % 180, dtype=np.uint8)
    pixels[:, number * 3 % width] = 255
    pixels[:12, :12] = 255, 0, 0
    return pixels


def write_film(
    path, num_frames=24, codec="mpeg4", rate=25, gop=12, b_frames=0, times=None, rotation=None, options=None, muxer=None
):
    """Writes a film and returns its path. `times`: milliseconds at which the frames are shown, for uneven ones."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        (stream.height, stream.width), stream.pix_fmt = SIZE, "yuv420p"
        stream.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def decode(path):
    """Every frame of a film, as the reference's `read_video_pyav` sees them: (frames, height, width, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_sound(path, cover=False):
    """A second of silence as AAC; with `cover`, the picture of an album stands in the file as a film would."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        if cover:
            art = container.add_stream("png")
            (art.height, art.width), art.pix_fmt = SIZE, "rgb24"
            art.disposition = 0x400  # AV_DISPOSITION_ATTACHED_PIC
            container.mux(art.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
        for number in range(8):
            silence = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def remux(source, path, drop=0, earlier=0, options=None):
    """The same packets in another file, which starts `drop` packets later or shows `earlier` frames before time 0."""
    with av.open(str(source)) as film, av.open(str(path), "w", options=options or {}) as container:
        stream = film.streams.video[0]
        copy = container.add_stream_from_template(stream)
        shift = int(earlier / stream.average_rate / stream.time_base)
        for number, packet in enumerate(film.demux(stream)):
            if packet.dts is not None and number >= drop:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                container.mux(packet)
    return Path(path)
