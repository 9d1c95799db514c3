"""Video-LLaVA's films as people have them: files, which are sampled, and the number of frames that it has learned."""

import numpy as np
import pytest
import torch
from films import decode, write_film
from tiny import film, load, picture, turn, variant
from video_llava_tiny import opened

import minivlm
from minivlm.errors import MinivlmError


@pytest.fixture(scope="module")
def vlm():
    return opened()[1]


@pytest.fixture
def notes(capsys):
    """What was told on stderr since the last call."""
    return lambda: capsys.readouterr().err.splitlines()


def mp4(path, num_frames):
    """A file of ten frames a second, and its frames."""
    write_film(path, num_frames, rate=10)
    return path, decode(path)


def ask(source, **options):
    return [{"role": "user", "content": [{"type": "video", "video": source, **options}, {"type": "text", "text": "?"}]}]


def same(one, other):
    return torch.equal(one.pixel_values_videos, other.pixel_values_videos) and torch.equal(
        one.input_ids, other.input_ids
    )


@pytest.mark.parametrize("num_frames", [8, 21, 30])
def test_a_file_becomes_eight_frames_where_transformers_takes_them(vlm, tmp_path, notes, num_frames):
    path, frames = mp4(tmp_path / "film.mp4", num_frames)
    indices = np.arange(0, num_frames, num_frames / 8).astype(int)
    assert same(vlm.preprocess([ask(path)]), vlm.preprocess([ask([frames[i] for i in indices])]))
    others = np.linspace(0, num_frames - 1, 8).astype(int)
    linspace = same(vlm.preprocess([ask(path)]), vlm.preprocess([ask([frames[i] for i in others])]))
    assert linspace == (num_frames == 8)
    assert notes() == []


def test_a_message_may_choose_the_frames(vlm, tmp_path):
    path, frames = mp4(tmp_path / "film.mp4", 20)
    for options, indices in (
        ({"num_frames": 5}, [0, 4, 8, 12, 16]),
        ({"nframes": 20}, range(20)),
        ({"num_frames": 2, "video_start": 1.0}, [10, 15]),
    ):
        assert same(vlm.preprocess([ask(path, **options)]), vlm.preprocess([ask([frames[i] for i in indices])]))


def test_an_animation_and_an_array_are_films(vlm, tmp_path):
    frames = film(8, 30, 50)
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    wanted = vlm.preprocess([ask(frames)])
    assert same(vlm.preprocess([ask(tmp_path / "film.webp")]), wanted)
    assert same(vlm.preprocess([ask(np.stack(frames))]), wanted)


@pytest.mark.parametrize("num_frames", [7, 9])
def test_another_number_of_frames_is_told_once(vlm, notes, num_frames):
    vlm.preprocess([ask(film(8)), [turn("user", picture(9, 9), "Look.")]])
    assert notes() == []
    for _ in range(2):
        vlm.preprocess([ask(film(8)), ask(film(num_frames))])
    (line,) = notes()
    assert line == "minivlm: Video-LLaVA learned from films of 8 frames; of others it may understand less"


def test_a_file_of_fewer_frames_gives_all_it_has(vlm, tmp_path, notes):
    path, frames = mp4(tmp_path / "film.mp4", 3)
    assert same(vlm.preprocess([ask(path)]), vlm.preprocess([ask(frames)]))
    assert len(notes()) == 1


@pytest.mark.parametrize("source, options, told", [
    ([], {}, "at least one frame"),
    (np.zeros((0, 4, 4, 3), np.uint8), {}, "at least one frame|no frame|0 frames"),
    (film(2), {"frame_rate": 2}, "frame_rate"),
    (film(2), {"num_frames": 2, "fps": 1}, "by num_frames|by fps"),
    ([picture(8, 9), picture(9, 8)], {}, "one size"),
], ids=["no list", "empty array", "unknown option", "two ways to sample", "two sizes"])  # fmt: skip
def test_what_is_no_film_is_one_line(vlm, source, options, told):
    with pytest.raises(MinivlmError, match=told) as error:
        vlm.preprocess([ask(source, **options)])
    assert "\n" not in str(error.value)


def test_a_text_file_is_no_film(vlm, tmp_path):
    (tmp_path / "film.mp4").write_text("not a film")
    with pytest.raises(MinivlmError) as error:
        vlm.preprocess([ask(tmp_path / "film.mp4")])
    assert "film.mp4" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seen, told", [([film(8), film(8)], "1 placeholders for films, but 2"), ([], "but 0 were")])
def test_every_film_needs_its_placeholder(vlm, seen, told):
    with pytest.raises(MinivlmError, match=told):
        vlm.preprocess([minivlm.Prompt("USER: <video> ASSISTANT:", videos=seen)])


def test_a_literal_that_a_user_types_is_text(vlm):
    inputs = vlm.preprocess([[turn("user", film(8), "What does <video> mean?")]])
    assert int((inputs.input_ids == vlm.model.config.video_token_id).sum()) == 208


def test_a_film_is_no_target(tmp_path):
    vlm = load(variant(opened()[0].folder, tmp_path / "bare", drop=["chat_template*"]))  # our template marks answers
    talk = [turn("user", film(8), "What?"), turn("assistant", "A star.")]
    inputs = vlm.preprocess([talk], labels=True)
    assert vlm.processor.tokenizer.decode(inputs.labels[inputs.labels >= 0].tolist()).strip() == "A star."
    assert (inputs.labels[inputs.input_ids == vlm.model.config.video_token_id] == -100).all()
