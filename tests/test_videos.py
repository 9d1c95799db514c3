"""Which frames are taken of a film, and from whatever a film may be given as."""

import base64
import http.server
import threading

import numpy as np
import pytest
import torch
from films import decode, picture, write_film, write_sound
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minivlm import videos as module
from minivlm.errors import MinivlmError
from minivlm.open_film import Reel, Unsure
from minivlm.videos import FilmRule, KeptFilm, open_video, sample

EIGHT = FilmRule()
QWEN = FilmRule(num_frames=None, fps=2.0, multiple_of=2, min_frames=4, max_frames=768)
ORIGINAL = FilmRule(spacing="linspace")
ARRAY = np.stack([picture(number, (6, 8)) for number in range(12)])  # (frames, height, width, 3)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two seconds, 48 frames."""
    return write_film(tmp_path_factory.mktemp("films") / "a film.mp4", 48, rate=24)


def stack(film):
    return np.stack([np.asarray(frame) for frame in film.frames])


def error_of(source, options=None, rule=EIGHT):
    with pytest.raises(MinivlmError) as caught:
        open_video(source, options or {}, rule)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    return str(caught.value)


# ---- sampling


@given(st.data(), st.integers(1, 5000))
def test_sample_takes_the_reference_s_frames(data, n):
    k = data.draw(st.integers(1, min(n, 64)))
    theirs = torch.arange(0, n, n / k).int().tolist()  # transformers' sample_frames
    assert sample(n, 25.0, {"num_frames": k}, EIGHT) == theirs[:k]
    assert sample(n, 25.0, {"num_frames": k}, ORIGINAL) == np.linspace(0, n - 1, k, dtype=int).tolist()


def test_sample_makes_no_frame_that_does_not_exist():
    """The reference's rounding asks for frame 15 of a film of 15, frames 0 to 14."""
    theirs = torch.arange(0, 15, 15 / 13).int().tolist()
    assert len(theirs) == 14 and theirs[-1] == 15
    assert sample(15, 25.0, {"num_frames": 13}, EIGHT) == theirs[:13]


@given(st.integers(1, 5000), st.floats(0.5, 120), st.floats(0.1, 60))
def test_sample_by_fps_takes_the_reference_s_number(n, source_fps, fps):
    theirs = int(n / source_fps * fps)
    if theirs <= n:
        assert len(sample(n, source_fps, {"fps": fps}, EIGHT)) == max(theirs, 1)
    else:
        with pytest.raises(MinivlmError, match="frames per second, fewer than the"):
            sample(n, source_fps, {"fps": fps}, EIGHT)


@given(st.integers(2, 5000), st.floats(0.5, 120), st.floats(0.1, 60))
def test_qwen_s_rule_counts_as_its_reference_does(n, source_fps, fps):
    """Qwen2VLVideoProcessor.sample_frames, line by line."""
    most = min(768, n) // 2 * 2
    theirs = int(min(max(n / source_fps * fps, 4), most, n)) // 2 * 2
    ours = sample(n, source_fps, {"fps": fps}, QWEN)
    assert len(ours) == theirs and ours == torch.arange(0, n, n / theirs).int().tolist()[:theirs]


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([EIGHT, QWEN, ORIGINAL]))
def test_sampled_frames_exist_and_ascend(n, k, rule):
    for options in ({}, {"num_frames": k} if k <= n else {"fps": 1}):
        taken = sample(n, 25.0, options, rule)
        assert taken and taken == sorted(taken) and taken[0] == 0 and taken[-1] < n
        if rule is not ORIGINAL:
            assert len(set(taken)) == len(taken)


@pytest.mark.parametrize(("asked", "taken"), [(7, 8), (5, 4), (1, 2), (12, 12), (11, 12)])
def test_frame_pairs_round_the_number_of_frames(asked, taken):
    """Halves to even, as Python's round: 7 / 2 → 4 pairs, 5 / 2 → 2; one frame makes a pair."""
    assert len(sample(12, None, {"num_frames": asked}, QWEN)) == taken


def test_a_short_film_gives_all_its_frames_to_a_rule_and_refuses_a_demand():
    assert sample(5, 25.0, {}, EIGHT) == [0, 1, 2, 3, 4]
    assert sample(5, 25.0, {}, ORIGINAL) == [0, 0, 1, 1, 2, 2, 3, 4]  # the original repositories repeat frames
    assert sample(1, 25.0, {}, QWEN) == [0] == sample(1, None, {"fps": 2}, QWEN)
    for rule, asked in ((EIGHT, 8), (QWEN, 8), (ORIGINAL, 8), (ORIGINAL, 10**18)):
        with pytest.raises(MinivlmError, match="frames were asked for of the film, which has 5 there"):
            sample(5, 25.0, {"num_frames": asked}, rule)


# ---- files


def test_a_file_is_sampled_by_the_rule_unless_the_message_says(film):
    theirs = decode(film)
    for options, rule, indices in [
        ({}, EIGHT, [0, 6, 12, 18, 24, 30, 36, 42]),
        ({}, ORIGINAL, [0, 6, 13, 20, 26, 33, 40, 47]),
        ({}, QWEN, [0, 12, 24, 36]),
        ({"num_frames": 3}, EIGHT, [0, 16, 32]),
        ({"nframes": 3.0, "fps": None}, EIGHT, [0, 16, 32]),
        ({"fps": 1.5}, EIGHT, [0, 16, 32]),
        ({"fps": 4}, QWEN, [0, 6, 12, 18, 24, 30, 36, 42]),
        ({"num_frames": 48}, EIGHT, list(range(48))),
        ({"video_start": 1, "num_frames": 2}, EIGHT, [24, 36]),
        ({"video_start": 0.5, "video_end": 1, "num_frames": 13}, EIGHT, list(range(12, 25))),
        ({"video_end": 0}, EIGHT, [0]),
    ]:
        ours = open_video(film, options, rule)
        assert ours.indices == indices, options
        assert np.array_equal(stack(ours), theirs[indices])
        assert ours.seconds == pytest.approx([index / 24 for index in indices])
        assert (ours.num_source_frames, ours.fps) == (48, 24)


def test_an_uneven_film_is_cut_by_its_times_and_sampled_by_its_numbers(tmp_path):
    film = write_film(tmp_path / "film.mkv", 6, times=[0, 100, 200, 1000, 1100, 2000])
    ours = open_video(film, {"num_frames": 3}, EIGHT)
    assert ours.indices == [0, 2, 4] and ours.seconds == pytest.approx([0, 0.2, 1.1])
    assert open_video(film, {"video_start": 0.5, "video_end": 1.5}, EIGHT).indices == [3, 4]


def test_a_film_may_be_given_in_every_way(film):
    data = film.read_bytes()
    theirs = stack(open_video(film, {}, EIGHT))
    encoded = base64.b64encode(data).decode()
    for source in (str(film), film.as_uri(), data, bytearray(data), f"data:video/mp4;base64,{encoded}"):
        assert np.array_equal(stack(open_video(source, {}, EIGHT)), theirs)


def test_a_film_is_fetched_into_a_file_that_goes_away(film, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(film.read_bytes())

        def log_message(self, *_):
            pass

    files, make = [], module.tempfile.TemporaryFile
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda: files.append(make()) or files[-1])
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        ours = open_video(f"http://127.0.0.1:{server.server_port}/film.mp4", {}, EIGHT)
        monkeypatch.setattr(module, "MAX_BYTES", 1000)
        assert "is larger than" in error_of(f"http://127.0.0.1:{server.server_port}/film.mp4")
        server.shutdown()
    assert np.array_equal(stack(ours), decode(film)[ours.indices])
    assert files[0].closed


def test_a_film_whose_packets_lie_is_decoded_from_end_to_end(film, monkeypatch):
    def take(_):
        raise Unsure
        yield

    honest, asked = module.open_film, []

    def lying(file, name, head, decode_all=False):
        asked.append(decode_all)
        return honest(file, name, head, True) if decode_all else Reel([0.0, 1.0], 1.0, take)

    monkeypatch.setattr(module, "open_film", lying)
    ours = open_video(film, {}, EIGHT)
    assert asked == [False, True] and ours.num_source_frames == 48
    assert np.array_equal(stack(ours), decode(film)[ours.indices])


def test_frames_are_prepared_one_by_one(film):
    """So that a long film of large frames is held at the size that the model sees."""

    def prepare(frame, num_frames):
        assert num_frames == 48 and frame.size == (64, 48)
        return frame.resize((8, 6))

    ours = open_video(film, {"num_frames": 48}, EIGHT, prepare)
    assert {frame.size for frame in ours.frames} == {(8, 6)}


def test_a_kept_film_is_opened_once_and_remembers(film):
    kept = KeptFilm(film)
    ours = open_video(kept, {"num_frames": 2}, EIGHT)
    assert kept.film is ours and ours.indices == [0, 24]
    assert open_video(kept, {"num_frames": 2}, EIGHT) is ours


# ---- frames


def test_frames_are_taken_as_they_are(tmp_path):
    pictures = [Image.fromarray(frame) for frame in ARRAY]
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for frame, path in zip(pictures, paths, strict=True):
        frame.save(path)
    for source in (ARRAY, pictures, tuple(pictures), paths, list(ARRAY)):
        ours = open_video(source, {}, FilmRule(num_frames=2))
        assert np.array_equal(stack(ours), ARRAY)
        assert (ours.indices, ours.num_source_frames, ours.fps, ours.seconds) == (list(range(12)), 12, None, None)


def test_frames_are_sampled_only_where_that_is_asked_for():
    assert open_video(ARRAY, {"num_frames": 3}, EIGHT).indices == [0, 4, 8]
    ours = open_video(ARRAY, {"fps": 2}, EIGHT)  # as Qwen's messages: how fast the frames follow each other
    assert ours.indices == list(range(12)) and ours.fps == 2 and ours.seconds[:3] == [0, 0.5, 1]
    assert len(open_video(ARRAY[:12], {"fps": 0.7}, EIGHT).frames) == 12  # and not int(12 / 0.7 * 0.7), 11
    assert open_video(ARRAY, {"fps": 2, "video_start": 1, "video_end": 2}, EIGHT).indices == [2, 3, 4]


# ---- errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fps": 1, "num_frames": 3}, "sampled by fps or by num_frames, not by both"),
        ({"nframes": 1, "num_frames": 3}, "sampled by num_frames or by nframes, not by both"),
        ({"frames": 3}, "has the setting 'frames'; known here: fps, num_frames"),
        ({"num_frames": 0}, "num_frames is a whole number of frames, at least 1, not 0"),
        ({"num_frames": 2.5}, "not 2.5"),
        ({"num_frames": True}, "not True"),
        ({"nframes": "8"}, "not '8'"),
        ({"fps": 0}, "fps is a number above 0, not 0"),
        ({"fps": float("nan")}, "not nan"),
        ({"fps": 1e308}, "fps is a number above 0, not 1e+308"),
        ({"fps": 10**400}, "fps is a number above 0, not 1000"),
        ({"fps": 9e18}, "has 24 frames per second, fewer than the 9e+18 asked for"),
        ({"num_frames": -(10**400)}, "num_frames is a whole number of frames, at least 1, not -1000"),
        ({"video_end": 10**400}, "video_end is a number of seconds, 0 or more, not 1000"),
        ({"video_start": -1}, "video_start is a number of seconds, 0 or more, not -1"),
        ({"video_start": 2, "video_end": 1}, "video_start, 2 s, is after video_end, 1 s"),
        ({"video_start": 20}, "has no frame from 20 s: its last is shown at 1.96 s"),
        ({"video_start": 0.51, "video_end": 0.52}, "has no frame from 0.51 s until 0.52 s"),
        ({"num_frames": 49}, "49 frames were asked for of"),
        ({"fps": 25}, "has 24 frames per second, fewer than the 25 asked for"),
    ],
)
def test_what_cannot_be_is_one_line(film, options, says):
    assert says in error_of(film, options)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (3, "not int"),
        (None, "not NoneType"),
        ("no such film.mp4", "no such file"),
        ("", "the name of a film is empty"),
        ("rtsp://127.0.0.1/film", "only http, https, file and data URLs"),
        ("data:video/mp4;base64,AAAA", "is not a film that can be opened"),
        ([], "this list is empty"),
        (ARRAY[:0], "this list is empty"),
        (ARRAY.astype(np.float32), "not float32"),
        ([ARRAY[0], ARRAY[1, :3]], "differ in size, 3 x 8 and 6 x 8 pixels"),
        (["no such frame.png"], "no such file"),
    ],
)
def test_what_is_no_film_is_one_line(source, says):
    assert says in error_of(source)


def test_frames_of_two_sizes_are_named_as_they_were_given():
    """And not as `prepare` leaves them; what it makes alike is no matter."""
    frames = [ARRAY[0], ARRAY[1, :3]]
    with pytest.raises(MinivlmError, match="differ in size, 3 x 8 and 6 x 8 pixels"):
        open_video(frames, {}, EIGHT, lambda frame, _: frame.resize((frame.height, 20)))
    assert len(open_video(frames, {}, EIGHT, lambda frame, _: frame.resize((9, 9))).frames) == 2


def test_frames_without_a_rate_have_no_times():
    assert "need fps" in error_of(ARRAY, {"video_start": 1})


def test_sound_and_directories_are_not_films(tmp_path):
    assert "has no pictures in it, only sound" in error_of(write_sound(tmp_path / "song.mp4"))
    assert "is a directory, not a film" in error_of(tmp_path)
