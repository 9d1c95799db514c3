"""LLaVA-OneVision's folders: every key layout, sparse configs, settings for pictures and films, what is refused."""

import json

import pytest
import tiny
import torch
from onevision_tiny import VIDEO_PREPROCESSOR, opened
from tiny import film, load, picture, turn
from transformers import AutoConfig

import minivlm
from minivlm import MinivlmError
from minivlm.image_config import CLIP_MEAN
from minivlm.models.llava_onevision import PINPOINTS, LlavaOnevisionConfig

TALKS = [
    [turn("user", picture(60, 100), film(2), "What is this?")],
    [turn("user", picture(40, 40, 1), picture(90, 77, 2), "Compare."), turn("assistant", "Yes.")],
]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_template_gets_the_published_one(tmp_path):
    checkpoint, vlm = opened()
    other = load(tiny.variant(checkpoint.folder, tmp_path / "bare", drop=["chat_template*"]))
    talks = [[turn("system", "Be brief."), *TALKS[0]], *TALKS]
    for labels in (False, True):
        ours, wanted = other.preprocess(talks, labels=labels), vlm.preprocess(talks, labels=labels)
        assert torch.equal(ours.input_ids, wanted.input_ids)
        assert not labels or torch.equal(ours.labels, wanted.labels) and (ours.labels >= 0).any()


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}, {"model_type": "llama"}], ids=str)
@pytest.mark.parametrize("vision", [None, {}, {"model_type": "siglip_vision_model"}, {"num_hidden_layers": 3}], ids=str)
def test_what_a_config_leaves_out_is_what_transformers_takes(text, vision):
    sparse = {"text_config": text} | ({} if vision is None else {"vision_config": vision})
    theirs = AutoConfig.for_model("llava_onevision", **json.loads(json.dumps(sparse))).to_dict()
    assert LlavaOnevisionConfig.from_hf(sparse) == LlavaOnevisionConfig.from_hf(json.loads(json.dumps(theirs)))


def test_the_defaults_are_those_of_the_published_files():
    config = LlavaOnevisionConfig.from_hf({})
    assert config.pinpoints == PINPOINTS and len(PINPOINTS) == 36 and PINPOINTS[1] == (384, 768)
    assert (config.llava.image_token_id, config.video_token_id, config.max_tiles) == (151646, 151647, 9)
    assert (config.llava.vision.num_layers, config.llava.vision.grid_side) == (26, 27)
    named = {"image_token_id": 5, "video_token_id": 6}
    config = LlavaOnevisionConfig.from_hf(named)
    assert (config.llava.image_token_id, config.video_token_id) == (5, 6)


REFUSED = {
    "a patch taken for a class token": ({"vision_feature_select_strategy": "default"}, "select_strategy"),
    "a class token among the patches": ({"vision_config": {"model_type": "clip_vision_model"}}, "select_strategy"),
    "another way to fit": ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio"),
    "no tiles at all": ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio"),
    "a layer that is not there": ({"vision_feature_layer": 27}, "vision_feature_layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_meant_is_refused_by_name(case):
    config, named = REFUSED[case]
    with pytest.raises(MinivlmError, match=named):
        LlavaOnevisionConfig.from_hf(config)


# --- settings for pictures and films ----------------------------------------------------------------------------------


def test_a_silent_file_means_transformers_defaults(tmp_path):
    """The mean of a CLIP, and no crop."""
    checkpoint, _ = opened()
    folder = tiny.variant(checkpoint.folder, tmp_path / "silent", drop=["*preprocessor_config.json"])
    images = minivlm.load(folder, device="cpu", weights=False).processor.images
    assert images.image_mean == CLIP_MEAN and images.size[:2] == (43, 43)
    assert not images.do_center_crop and images.crop_size is None and images.tile == 43


def test_films_have_settings_of_their_own_and_they_are_those_of_pictures(tmp_path):
    checkpoint, _ = opened()
    folder = tiny.variant(checkpoint.folder, tmp_path / "other")
    tiny.write_json(folder / "video_preprocessor_config.json", VIDEO_PREPROCESSOR | {"resample": 2})
    with pytest.raises(MinivlmError, match="films"):
        load(folder)


def test_what_is_padded_to_a_square_is_no_matter_of_do_pad():
    """Which in their files is about tiles in a batch: each of several pictures is, and no frame."""
    vlm, talk = opened()[1], [turn("user", picture(60, 90), picture(9, 40), film(2), "What?")]
    one, other = (vlm.preprocess([talk], images_kwargs={"do_pad": do_pad}) for do_pad in (True, False))
    assert torch.equal(one.pixel_values, other.pixel_values)
    assert torch.equal(one.pixel_values_videos, other.pixel_values_videos)


@pytest.mark.parametrize("parts", [(picture(60, 90), picture(9, 9)), (film(1),)], ids=["pictures", "film"])
def test_pixels_that_the_tower_cannot_see_are_refused(parts):
    _, vlm = opened()
    with pytest.raises(MinivlmError, match="43 x 43"):
        vlm.preprocess([[turn("user", *parts, "What?")]], images_kwargs={"do_resize": False})


def test_placeholders_without_pictures_are_counted():
    _, vlm = opened()
    for prompt in (minivlm.Prompt("<image> a"), minivlm.Prompt("a", videos=[film(1)])):
        with pytest.raises(MinivlmError, match="placeholders for"):
            vlm.preprocess([prompt])
