"""Video-LLaVA's folders: every key layout, strictly; what we save; configs; the settings that a folder may have."""

import json

import pytest
import tiny
import torch
from tiny import close, film, load, our_logits, their_logits, turn
from transformers import AutoConfig, VideoLlavaForConditionalGeneration
from video_llava_tiny import PREPROCESSOR, opened, their_inputs

import minivlm
from minivlm.errors import MinivlmError
from minivlm.models import video_llava
from minivlm.models.video_llava import VideoLlavaConfig

TALKS = [
    [turn("user", tiny.picture(47, 91), film(8), "What is this?")],
    [turn("user", "Hello! Nothing to see here.")],
]
TIED = "no bias, relu, grouped heads, tied"


@pytest.fixture(scope="module")
def checkpoints():
    return opened


def in_layout(checkpoint, layout, folder):
    """tiny.in_layout, without their processor, which does not save itself here."""
    if layout != "save_pretrained":
        return tiny.in_layout(checkpoint, layout, folder)
    checkpoint.theirs.save_pretrained(folder)
    for file in checkpoint.folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def reload(folder):
    return VideoLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("layout", tiny.FOLDERS)
@pytest.mark.parametrize("name", ["hub", TIED])
def test_every_key_layout_gives_the_same_logits(checkpoints, tmp_path, name, layout):
    checkpoint, vlm = checkpoints(name)
    other = load(in_layout(checkpoint, layout, tmp_path / "other"))
    assert torch.equal(our_logits(other, other.preprocess(TALKS)), our_logits(vlm, vlm.preprocess(TALKS)))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_transformers_reads_the_layouts_that_these_tests_write(checkpoints, tmp_path, layout):
    checkpoint, _ = checkpoints()
    theirs = their_inputs(checkpoint.processor, TALKS)
    again = reload(in_layout(checkpoint, layout, tmp_path / "other"))
    assert close(their_logits(again, theirs), their_logits(checkpoint.theirs, theirs))


@pytest.mark.parametrize("name", ["hub", TIED])
def test_transformers_reads_what_we_save(checkpoints, tmp_path, name):
    checkpoint, vlm = checkpoints(name)
    vlm.save(tmp_path / "saved")
    theirs = their_inputs(checkpoint.processor, TALKS)
    assert close(their_logits(reload(tmp_path / "saved"), theirs), their_logits(checkpoint.theirs, theirs), atol=1e-6)
    assert our_logits(load(tmp_path / "saved"), vlm.preprocess(TALKS)).equal(our_logits(vlm, vlm.preprocess(TALKS)))


def test_without_its_vision_weights_a_model_reads_text_alike(checkpoints):
    checkpoint, vlm = checkpoints()
    blind = minivlm.load(checkpoint.folder, device="cpu", dtype="float32", vision=False)
    assert torch.equal(our_logits(blind, blind.preprocess([TALKS[1]])), our_logits(vlm, vlm.preprocess([TALKS[1]])))
    assert all(p.is_meta for tower in (blind.model.image_tower, blind.model.video_tower) for p in tower.parameters())
    for seen in (tiny.picture(9, 9), film(8)):
        with pytest.raises(MinivlmError, match="without its vision part"):
            blind.preprocess([[turn("user", seen, "What?")]])


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
def test_a_tensor_that_does_not_fit_is_named(checkpoints, tmp_path, damage):
    checkpoint, _ = checkpoints()
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
def test_settings_for_films_that_are_those_for_pictures_change_nothing(checkpoints, tmp_path, place):
    checkpoint, vlm = checkpoints()
    other = load(settle(checkpoint, tmp_path / "settled", place, FILM_SETTINGS))
    ours, wanted = other.preprocess(TALKS), vlm.preprocess(TALKS)
    assert torch.equal(ours.pixel_values, wanted.pixel_values)
    assert torch.equal(ours.pixel_values_videos, wanted.pixel_values_videos)


@pytest.mark.parametrize("place", ["video_preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("change", [{"resample": 2}, {"image_mean": [0.5, 0.5, 0.5]}, {"size": 42}], ids=str)
def test_other_settings_for_films_are_refused(checkpoints, tmp_path, place, change):
    checkpoint, _ = checkpoints()
    with pytest.raises(MinivlmError, match="settings for films are not those for pictures"):
        load(settle(checkpoint, tmp_path / "settled", place, FILM_SETTINGS | change))


def test_an_unknown_setting_for_films_is_named(checkpoints, tmp_path):
    checkpoint, _ = checkpoints()
    settings = FILM_SETTINGS | {"frame_interpolation": "cubic"}
    with pytest.raises(MinivlmError, match="frame_interpolation"):
        load(settle(checkpoint, tmp_path / "settled", "video_preprocessor_config.json", settings))


def test_a_caller_s_settings_concern_pictures_and_films(checkpoints):
    _, vlm = checkpoints()
    ours, wanted = (vlm.preprocess(TALKS, images_kwargs=kwargs) for kwargs in ({"do_normalize": False}, {}))
    for field in ("pixel_values", "pixel_values_videos"):
        pixels = vars(ours)[field]
        assert pixels.min() >= 0 and pixels.max() <= 1 and not close(pixels, vars(wanted)[field])


@pytest.mark.parametrize("settings", [{"crop_size": 32}, {"do_center_crop": False}], ids=str)
@pytest.mark.parametrize("seen", [tiny.picture(47, 91), film(8)], ids=["picture", "film"])
def test_pixels_that_the_towers_cannot_see_are_refused(checkpoints, settings, seen):
    _, vlm = checkpoints()
    with pytest.raises(MinivlmError, match="40 x 40"):
        vlm.preprocess([[turn("user", seen, "What?")]], images_kwargs=settings)
