"""Qwen2-VL's films: how files are sampled, how large frames are, what is announced, and the reference's own numbers."""

import base64
import json
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import av
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from qwen2_vl_tiny import (
    DOCUMENTED,
    FILM_SETTINGS,
    FILM_SIZES,
    KINDS,
    PREPROCESSOR,
    SAMPLED,
    VIDEO,
    ask,
    by_cell,
    film_of,
    of_inputs,
    opened,
    their_images,
    their_logits,
    their_positions,
)  # fmt: skip
from tiny import close, load, our_logits, picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from minivlm.errors import MinivlmError
from minivlm.models.qwen2_vl_patches import frame_size
from minivlm.videos import sample

FIXTURES = Path(__file__).with_name("fixtures") / "qwen2_vl_videos"


def film_grid(vlm, num_frames=6, size=(80, 80), images_kwargs=None, **options):
    frames = [picture(*size, i) for i in range(num_frames)]
    talk = ask({"type": "video", "video": frames, **options}, "What?")
    return vlm.preprocess([talk], images_kwargs=images_kwargs).video_grid_thw.tolist()


def with_settings(checkpoint, folder, settings, name="video_preprocessor_config.json"):
    """The processor of a folder that says something of films."""
    folder = tiny.variant(checkpoint.folder, folder)
    tiny.write_json(folder / name, settings)
    return load(folder)


# --- parity, with what tests/fixtures/qwen2_vl_videos holds -----------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return {name: torch.from_numpy(x).long() for name, x in np.load(FIXTURES / "films.npz").items()}


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    """The processor of a folder with the settings that the fixtures were made with."""
    return with_settings(opened()[0], tmp_path_factory.mktemp("films") / "capped", FILM_SETTINGS)


def grey(inputs):
    """The grey levels of a film's patches, in the reference's order."""
    mean, std = (torch.tensor(PREPROCESSOR[f"image_{name}"]).repeat_interleave(32) for name in ("mean", "std"))
    levels = (inputs.pixel_values_videos * std + mean) * 255
    return by_cell(levels.round().long(), inputs.video_grid_thw)


def seen(vlm, num_frames, change=lambda frames: frames, **options):
    part = {"type": "video", "video": change(film_of(num_frames)), **options}
    return vlm.preprocess([ask("See ", part, "What moves?")])


@pytest.mark.parametrize("num_frames", FILM_SIZES)
def test_films_have_the_pixels_of_transformers(capped, stored, num_frames):
    """Its resize is torch's and ours is Pillow's, so that a level may be off by one."""
    inputs = seen(capped, num_frames)
    assert inputs.video_grid_thw.tolist() == [stored[f"grid_{num_frames}"].tolist()]
    difference = (grey(inputs) - stored[f"grey_{num_frames}"]).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("num_frames, change", [
    (24, lambda frames: frames[::-1]), (5, lambda frames: frames + frames[:1]), (7, lambda frames: frames[:6]),
], ids=["backwards", "another last frame", "a frame less"])  # fmt: skip
def test_other_frames_have_other_pixels(capped, stored, num_frames, change):
    ours, theirs = grey(seen(capped, num_frames, change)), stored[f"grey_{num_frames}"]
    assert ours.shape != theirs.shape or (ours - theirs).abs().max() > 20


def test_another_filter_has_other_pixels(capped, stored):
    talk = [ask({"type": "video", "video": film_of(24)}, "What?")]
    ours = grey(capped.preprocess(talk, images_kwargs={"resample": 2}))
    assert ((ours - stored["grey_24"]).abs() > 1).float().mean() > 0.1


def test_without_the_budget_of_a_film_sizes_are_others(stored, tmp_path):
    free = with_settings(opened()[0], tmp_path / "free", FILM_SETTINGS | {"cap_pixels_per_frame": False})
    assert [seen(free, n).video_grid_thw[0].tolist() == stored[f"grid_{n}"].tolist() for n in FILM_SIZES] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_frames_are_sampled_as_by_transformers():
    """By frames per second and by number; the rule of another family, which counts odd numbers too, takes others."""
    theirs = json.loads((FIXTURES / "sampled.json").read_text())
    rule = opened()[1].processor.images.sampling
    wrong = replace(rule, multiple_of=1)
    differ = 0
    for (total, rate, asked), wanted in zip(SAMPLED, theirs, strict=True):
        assert sample(total, rate, asked, rule) == wanted, (total, rate, asked)
        differ += sample(total, rate, asked, wrong) != wanted
    assert differ > 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_conversations_of_the_documentation(stored, tmp_path, kind):
    """A picture, two pictures, text, and all at once: one left-padded batch, every seam of it."""
    checkpoint, _ = opened(kind)
    vlm = with_settings(checkpoint, tmp_path / "capped", FILM_SETTINGS)
    ours = vlm.preprocess(DOCUMENTED)
    assert torch.equal(ours.input_ids, stored["input_ids"])
    assert torch.equal(ours.attention_mask, stored["attention_mask"])
    assert torch.equal(ours.image_grid_thw, stored["image_grid_thw"])
    assert torch.equal(ours.video_grid_thw, stored["video_grid_thw"])
    assert (grey(ours) - stored["grey"]).abs().max() <= 1
    images = [part["image"] for talk in DOCUMENTED for part in talk[0]["content"] if part["type"] == "image"]
    pixels = their_images(images)["pixel_values"]
    assert torch.equal(by_cell(ours.pixel_values, ours.image_grid_thw), pixels)
    theirs = of_inputs(ours)
    real = ours.attention_mask > 0
    assert torch.equal(vlm.model.positions(ours)[:, real], their_positions(checkpoint.theirs, theirs)[:, real])
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))
    answers = tiny.their_answers(
        checkpoint.theirs, theirs, vlm.eos_ids, vlm.processor.tokenizer.pad_id, max_new_tokens=16
    )
    assert [answer.token_ids for answer in vlm.generate(DOCUMENTED, max_new_tokens=16)] == answers


# --- the size of frames -----------------------------------------------------------------------------------------------


def test_limits_of_films():
    """A frame has 128 to 768 tokens of 8 × 8 pixels, unless the part asks for others, or for a size, which pictures'
    limits hold."""
    _, vlm = opened()
    assert film_grid(vlm, 1) == [[1, 24, 24]]
    assert film_grid(vlm, 1, (400, 400)) == [[1, 54, 54]]
    assert film_grid(vlm, 1, (400, 400), max_pixels=200 * 64) == [[1, 28, 28]]
    assert film_grid(vlm, 1, (400, 400), max_pixels=16 * 64) == [[1, 8, 8]]  # what was asked for, not 128 tokens
    assert film_grid(vlm, 1, (56, 120), max_pixels=100 * 64) == [[1, 12, 28]]  # and not 5 % more
    assert film_grid(vlm, 1, min_pixels=900 * 64) == [[1, 60, 60]]  # and neither 768
    assert film_grid(vlm, 1, min_pixels=None, max_pixels=None, fps=2.0) == [[1, 24, 24]]
    assert film_grid(vlm, 1, resized_height=24, resized_width=40) == [[1, 6, 10]]


def test_limits_of_a_call_are_those_of_frames_too():
    _, vlm = opened()
    assert film_grid(vlm, 1, (400, 400), images_kwargs={"max_pixels": 16 * 64}) == [[1, 8, 8]]
    assert film_grid(vlm, 1, (400, 400), images_kwargs={"max_pixels": 1000 * 64}) == [[1, 62, 62]]
    assert film_grid(vlm, 1, images_kwargs={"min_pixels": 900 * 64, "max_pixels": 1000 * 64}) == [[1, 60, 60]]
    assert film_grid(vlm, 1, (400, 400), {"max_pixels": 16 * 64}, max_pixels=36 * 64) == [[1, 12, 12]]


def test_a_long_film_has_small_frames(tmp_path):
    """3 frame pairs share 30 tokens: 10 for each, but no fewer than 1.05 of min_pixels."""
    checkpoint, _ = opened()
    limits = {"min_pixels": 4 * 64, "max_pixels": 768 * 64}
    vlm = with_settings(checkpoint, tmp_path / "short", {**limits, "max_video_tokens": 34})
    assert film_grid(vlm) == [[3, 6, 6]]
    assert film_grid(vlm, max_pixels=200 * 64) == [[3, 6, 6]]
    assert film_grid(vlm, min_pixels=24 * 64) == [[3, 10, 10]]
    free = {"max_video_tokens": 34, "cap_pixels_per_frame": False}
    assert film_grid(with_settings(checkpoint, tmp_path / "free", limits | free)) == [[3, 20, 20]]


@given(
    height=st.integers(1, 2000), width=st.integers(1, 2000), num_frames=st.integers(1, 768),
    least=st.integers(1, 200), more=st.integers(0, 2000),
)  # fmt: skip
def test_frames_are_as_large_as_in_transformers(height, width, num_frames, least, more):
    """Its `Qwen2VLVideoProcessor.resize` with `cap_pixels_per_frame`, in cells of 8 × 8 pixels."""
    _, vlm = opened()
    if max(height, width) > 200 * min(height, width):
        return
    least, most = least * 64, (least + more) * 64
    settings = vlm.processor.images
    settings = replace(settings, frames=replace(settings.frames, min_pixels=least, max_pixels=most))
    share = int(128_000 * 64 * 0.9) * 2 // num_frames
    theirs = smart_resize(height, width, 8, least, max(min(most, share), int(1.05 * least)))
    assert frame_size((height, width), num_frames, {}, settings) == theirs


SETTINGS = {
    "do_sample_frames": False, "return_metadata": False, "video_processor_type": "Qwen2VLVideoProcessor",
    "size": {"shortest_edge": 4 * 64, "longest_edge": 25 * 64}, "patch_size": 4, "merge_size": 2,
    "temporal_patch_size": 2, "min_frames": 2, "max_frames": 6, "fps": 4, "image_mean": [0.5, 0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize("name", ["video_preprocessor_config.json", "processor_config.json"])
def test_a_folders_settings_for_films_are_followed(tmp_path, name):
    checkpoint, vlm = opened()
    told = with_settings(
        checkpoint, tmp_path / "f", {"video_processor": SETTINGS} if name[0] == "p" else SETTINGS, name
    )
    images = told.processor.images
    assert film_grid(told, 1, (400, 400)) == [[1, 10, 10]]
    assert images.pictures == vlm.processor.images.pictures
    assert images.frames.image_mean == (0.5, 0.5, 0.5) != images.pictures.image_mean
    rule = images.sampling
    assert (rule.fps, rule.num_frames, rule.min_frames, rule.max_frames, rule.multiple_of) == (4, None, 2, 6, 2)


def test_a_folder_that_says_nothing_of_films_shows_frames_as_pictures(tmp_path):
    """But for their limits."""
    other = PREPROCESSOR | {"image_mean": [0.5, 0.4, 0.3], "resample": 2}
    images = with_settings(opened()[0], tmp_path / "f", other, "preprocessor_config.json").processor.images
    limits = {"min_pixels": images.frames.min_pixels, "max_pixels": images.frames.max_pixels}
    assert images.frames == replace(images.pictures, **limits) and images.frames.image_mean == (0.5, 0.4, 0.3)
    assert limits["max_pixels"] != images.pictures.max_pixels


@pytest.mark.parametrize("settings, said", [
    ({"fps": 2, "num_frames": 8}, "not by both"),
    ({"fps": -1}, "fps"),
    ({"max_frames": 0}, "max_frames"),
    ({"min_frames": "4"}, "min_frames"),
    ({"temporal_patch_size": 1}, "temporal_patch_size 1"),
    ({"frames_upbound": 8}, "'frames_upbound'"),
    ({"size": {"height": 8, "width": 8}}, "area"),
    ({"do_center_crop": True, "crop_size": 8}, "neither crops"),
])  # fmt: skip
def test_a_folders_setting_that_cannot_be_followed_is_named(tmp_path, settings, said):
    checkpoint, _ = opened()
    with pytest.raises(MinivlmError, match=said):
        film_grid(with_settings(checkpoint, tmp_path / "bad", settings))


# --- files ------------------------------------------------------------------------------------------------------------


def write_film(path, num_frames, rate=8, size=(48, 80)):
    """Grey frames, frame i of level 4 i; lossless."""
    with av.open(path, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 4 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(vlm, inputs):
    """The grey level of each frame pair's two frames."""
    images = vlm.processor.images.frames
    mean, std = images.image_mean[0], images.image_std[0]
    t, h, w = inputs.video_grid_thw[0].tolist()
    red = inputs.pixel_values_videos.view(t, h * w, 3, 2, -1)[:, 0, 0, :, 0]
    return ((red * std + mean) * 255).round().int().flatten().tolist()


@pytest.mark.parametrize("num_frames, options, taken", [
    (40, {}, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]),  # 5 seconds, 2 frames each
    (40, {"fps": 1}, [0, 10, 20, 30]),  # 5 would be odd
    (40, {"fps": 0.1}, [0, 10, 20, 30]),  # 4 at least
    (40, {"num_frames": 7}, [0, 5, 10, 15, 20, 25, 30, 35]),  # an even number
    (40, {"nframes": 2}, [0, 20]),
    (40, {"video_start": 1, "video_end": 2.9}, [8, 12, 16, 20]),
    (3, {}, [0, 1]),  # of 3 frames an even number
    (1, {}, [0, 0]),
])  # fmt: skip
def test_a_file_is_sampled_by_qwens_rule(tmp_path, num_frames, options, taken):
    """8 frames a second; the frames' levels tell which they are."""
    _, vlm = opened()
    part = {"type": "video", "video": write_film(tmp_path / "film.mkv", num_frames), **options}
    ours = levels(vlm, vlm.preprocess([ask(part, "What?")]))
    assert [level // 4 for level in ours] == taken


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def url(tmp_path):
    """Where the test's folder is on the web."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_film_comes_from_anywhere(tmp_path, url):
    _, vlm = opened()
    path = write_film(tmp_path / "a film.mkv", 8)
    data = "data:video/x-matroska;base64," + base64.b64encode(path.read_bytes()).decode()
    sources = [path, str(path), path.as_uri(), data, path.read_bytes(), f"{url}/a%20film.mkv"]
    talks = [ask({"type": "video", "video": source}, "What?") for source in sources]
    talks.append(ask({"type": "video_url", "video_url": {"url": data}}, "What?"))
    inputs = [vlm.preprocess([talk]) for talk in talks]
    assert all(torch.equal(i.pixel_values_videos, inputs[0].pixel_values_videos) for i in inputs)
    assert (inputs[0].input_ids == VIDEO).sum() == 2 * 9 * 15  # 48 × 80 pixels become at least 128 tokens


def test_a_picture_comes_from_anywhere(tmp_path, url):
    _, vlm = opened()
    path = tmp_path / "a picture.png"
    picture(30, 50).save(path)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    sources = [picture(30, 50), path, path.as_uri(), data, path.read_bytes(), f"{url}/a%20picture.png"]
    talks = [ask({"type": "image", "image": source}, "What?") for source in sources]
    talks.append(ask({"type": "image_url", "image_url": {"url": data}}, "What?"))
    pixels = [vlm.preprocess([talk]).pixel_values for talk in talks]
    assert all(torch.equal(p, pixels[0]) for p in pixels)


# --- what is announced ------------------------------------------------------------------------------------------------


def test_a_limit_that_bites_is_announced(tmp_path, capsys):
    checkpoint, vlm = opened()
    film_grid(vlm, 3, (400, 400))
    told = capsys.readouterr().err
    assert told == (
        "minivlm: a film of 3 frames, 400 x 400 pixels, is seen at 216 x 216, as 1458 tokens; max_pixels sets another "
        "limit\n"
    )
    vlm.preprocess([ask(picture(160, 160), "What?")])
    assert capsys.readouterr().err == (
        "minivlm: a picture, 160 x 160 pixels, is seen at 56 x 56, as 49 tokens; max_pixels sets another limit\n"
    )
    film_grid(with_settings(checkpoint, tmp_path / "few", {"max_video_tokens": 400}), 4, (400, 400), max_pixels=10**6)
    assert "8 tokens; fewer frames may be larger" in capsys.readouterr().err
    slow = with_settings(checkpoint, tmp_path / "slow", {"fps": 4, "max_frames": 6})
    part = {"type": "video", "video": write_film(tmp_path / "film.mkv", 40)}
    slow.preprocess([ask(part, "What?")])
    assert "too long for 4 frames a second: 6 are taken, every 0.825 s" in capsys.readouterr().err


def test_what_was_asked_for_is_not_announced(tmp_path, capsys):
    checkpoint, vlm = opened()
    film_grid(vlm, 3, (400, 400), max_pixels=200 * 64)
    film_grid(vlm, 3, (400, 400), {"max_pixels": 200 * 64})
    film_grid(vlm, 3, (400, 400), resized_height=40, resized_width=40)
    film_grid(vlm, 3, (37, 41), min_pixels=64)  # rounded down, by no limit
    path = write_film(tmp_path / "film.mkv", 40)
    vlm.preprocess([ask({"type": "video", "video": path, "num_frames": 6}, picture(41, 37), "What?")])
    few = with_settings(checkpoint, tmp_path / "few", {"fps": 4, "max_frames": 6})  # as many as 1.5 s have
    path = write_film(tmp_path / "short.mkv", 24, rate=16)
    few.preprocess([ask({"type": "video", "video": path, "max_pixels": 64 * 64}, "What?")])
    assert capsys.readouterr().err == ""
