"""Video-LLaVA's folders: every key layout, strictly; what we save; configs; the settings that a folder may have."""

import json

import pytest
import tiny
import torch
from tiny import close, film, load, turn
from transformers import AutoConfig
from video_llava_tiny import PREPROCESSOR, opened

from minivlm.errors import MinivlmError
from minivlm.models import video_llava
from minivlm.models.video_llava import VideoLlavaConfig

TALKS = [
    [turn("user", tiny.picture(47, 91), film(8), "What is this?")],
    [turn("user", "Hello! Nothing to see here.")],
]
TIED = "no bias, relu, grouped heads, tied"


DAMAGE = {
    "a tower is missing": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("video_tower.")],
        "video_tower.vision_model.",
    ),
    "a tower too much": (
        lambda t: t.update({"vision_tower.vision_model.post_layernorm.bias": torch.ones(32)}),
        "vision_tower.vision_",
    ),
    "attention between frames": (
        lambda t: t.update({"video_tower.vision_model.encoder.layers.0.temporal_embedding": torch.ones(1, 8, 32)}),
        "temporal_embedding",
    ),
    "misshapen": (
        lambda t: t.update({"image_tower.vision_model.embeddings.position_embedding.weight": torch.ones(25, 32)}),
        "image_tower.vision_model.embeddings.position_embedding.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, damage):
    checkpoint, _ = opened()
    folder, (harm, name) = tmp_path / "damaged", DAMAGE[damage]
    tiny.variant(checkpoint.folder, folder, drop=["*.safetensors"])
    harm(tensors := tiny.tensors_of(checkpoint.theirs))
    tiny.save_tensors(tensors, folder)
    with pytest.raises(MinivlmError) as error:
        load(folder)
    assert name in str(error.value) and "\n" not in str(error.value)


# --- configs ----------------------------------------------------------------------------------------------------------


SPARSE = {  # what a file may leave out
    "hardly more than the types": {
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model"},
    },
    "nothing but the type": {},
    "no types": {"text_config": {"vocab_size": 99}, "vision_config": {"hidden_size": 96}},
    "an empty tower": {"vision_config": {}},
    "newer names": {"image_token_id": 7, "video_token_id": 8},
}  # fmt: skip


@pytest.mark.parametrize("sparse", SPARSE)
def test_what_a_config_leaves_out_is_what_transformers_takes(sparse):
    theirs = AutoConfig.for_model("video_llava", **json.loads(json.dumps(SPARSE[sparse])))
    full = json.loads(json.dumps(theirs.to_dict()))
    assert VideoLlavaConfig.from_hf(SPARSE[sparse]) == VideoLlavaConfig.from_hf(full)


def test_the_published_model_has_its_published_token_counts():
    config = VideoLlavaConfig.from_hf({})
    assert video_llava.num_image_tokens(config) == 256
    assert video_llava.num_video_tokens(config, video_llava.NUM_FRAMES) == 2056


# --- settings ---------------------------------------------------------------------------------------------------------

FILM_SETTINGS = PREPROCESSOR | {
    "do_sample_frames": False, "return_metadata": False, "video_processor_type": "VideoLlavaVideoProcessor",
    "image_processor_type": None, "processor_class": "VideoLlavaProcessor",
}  # fmt: skip


def settle(checkpoint, folder, place, settings):
    """The folder with settings for films in either of their places."""
    tiny.variant(checkpoint.folder, folder)
    if place == "video_preprocessor_config.json":
        tiny.write_json(folder / place, settings)
    else:  # as transformers 5 saves a processor
        (folder / "preprocessor_config.json").unlink()
        both = {"image_processor": PREPROCESSOR, "video_processor": settings, "processor_class": "VideoLlavaProcessor"}
        tiny.write_json(folder / place, both)
    return folder


@pytest.mark.parametrize("place", ["video_preprocessor_config.json", "processor_config.json"])
def test_settings_for_films_that_are_those_for_pictures_change_nothing(tmp_path, place):
    checkpoint, vlm = opened()
    other = load(settle(checkpoint, tmp_path / "settled", place, FILM_SETTINGS))
    ours, wanted = other.preprocess(TALKS), vlm.preprocess(TALKS)
    assert torch.equal(ours.pixel_values, wanted.pixel_values)
    assert torch.equal(ours.pixel_values_videos, wanted.pixel_values_videos)


@pytest.mark.parametrize("place", ["video_preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("change", [{"resample": 2}, {"image_mean": [0.5, 0.5, 0.5]}, {"size": 42}], ids=str)
def test_other_settings_for_films_are_refused(tmp_path, place, change):
    checkpoint, _ = opened()
    with pytest.raises(MinivlmError, match="settings for films are not those for pictures"):
        load(settle(checkpoint, tmp_path / "settled", place, FILM_SETTINGS | change))


def test_an_unknown_setting_for_films_is_named(tmp_path):
    checkpoint, _ = opened()
    settings = FILM_SETTINGS | {"frame_interpolation": "cubic"}
    with pytest.raises(MinivlmError, match="frame_interpolation"):
        load(settle(checkpoint, tmp_path / "settled", "video_preprocessor_config.json", settings))


def test_a_caller_s_settings_concern_pictures_and_films():
    _, vlm = opened()
    ours, wanted = (vlm.preprocess(TALKS, images_kwargs=kwargs) for kwargs in ({"do_normalize": False}, {}))
    for field in ("pixel_values", "pixel_values_videos"):
        pixels = vars(ours)[field]
        assert pixels.min() >= 0 and pixels.max() <= 1 and not close(pixels, vars(wanted)[field])


@pytest.mark.parametrize("settings", [{"crop_size": 32}, {"do_center_crop": False}], ids=str)
@pytest.mark.parametrize("seen", [tiny.picture(47, 91), film(8)], ids=["picture", "film"])
def test_pixels_that_the_towers_cannot_see_are_refused(settings, seen):
    _, vlm = opened()
    with pytest.raises(MinivlmError, match="40 x 40"):
        vlm.preprocess([[turn("user", seen, "What?")]], images_kwargs=settings)
