"""What every family's processor does alike, seen on LLaVA-NeXT, which takes pictures without settings, and Qwen2-VL."""

import numpy as np
import pytest
import qwen2_vl_tiny
import torch
from tiny import picture

import minivlm
from minivlm.demo import DEMO_CHECKPOINT
from minivlm.errors import MinivlmError
from minivlm.inputs import Prompt

FILM = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def processor():
    return minivlm.load(DEMO_CHECKPOINT, weights=False).processor


def ask(**part):
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]


@pytest.mark.parametrize("talk", [ask(type="video", video=FILM), Prompt("What?", videos=[FILM])], ids=["chat", "raw"])
def test_film_for_a_family_without_films_is_one_line(processor, talk):
    with pytest.raises(MinivlmError, match="this model takes pictures only"):
        processor([talk])


def test_settings_of_a_picture_are_known_or_refused(processor):
    with pytest.raises(MinivlmError, match="'min_pixels'; this model knows none"):
        processor([ask(type="image", image=picture(8, 8), min_pixels=64)])
    _, qwen = qwen2_vl_tiny.opened()
    with pytest.raises(MinivlmError, match="'fps'; known here: min_pixels, max_pixels"):
        qwen.processor([ask(type="image", image=picture(8, 8), fps=2)])


def test_settings_that_are_null_are_not_there(processor):
    """Rows of a table have all keys that any of them has."""
    talks = [
        ask(type="image", image=picture(8, 8), **more) for more in ({}, {"text": None, "video": None, "fps": None})
    ]
    plain, filled = (processor([talk]) for talk in talks)
    assert torch.equal(plain.pixel_values, filled.pixel_values)


def test_sizes_of_pictures_are_listed_row_by_row(processor):
    inputs = processor([ask(type="image", image=picture(*size)) for size in ((8, 9), (70, 6))])
    assert inputs.image_sizes.tolist() == [[8, 9], [70, 6]]
    assert processor([[{"role": "user", "content": "Hi."}]]).image_sizes is None
