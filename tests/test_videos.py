"""Which frames are taken of a film, and from whatever a film may be given as."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlm.errors import MinivlmError
from minivlm.videos import FilmRule, open_video, sample

QWEN = FilmRule(num_frames=None, fps=2.0, multiple_of=2, min_frames=4, max_frames=768)
ORIGINAL = FilmRule(spacing="linspace")
ARRAY = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)  # (frames, height, width, 3)


@given(st.data(), st.integers(1, 5000))
def test_sample_takes_the_reference_s_frames(data, n):
    k = data.draw(st.integers(1, min(n, 64)))
    theirs = torch.arange(0, n, n / k).int().tolist()  # transformers' sample_frames
    assert sample(n, 25.0, {"num_frames": k}, FilmRule()) == theirs[:k]
    assert sample(n, 25.0, {"num_frames": k}, ORIGINAL) == np.linspace(0, n - 1, k, dtype=int).tolist()


def test_open_video_takes_an_array_as_it_is():
    film = open_video(ARRAY, {}, FilmRule(num_frames=2))
    assert np.array_equal(np.stack([np.asarray(frame) for frame in film.frames]), ARRAY)
    assert film.indices == list(range(12)) and film.seconds is None


def test_open_video_refuses_more_frames_than_there_are():
    with pytest.raises(MinivlmError, match="13 frames were asked for of the film, which has 12"):
        open_video(ARRAY, {"num_frames": 13}, FilmRule())
