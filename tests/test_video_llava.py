"""Video-LLaVA against transformers, at every seam: pictures, films, both at once, left-padded batches of all kinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    close,
    film,
    load,
    media,
    our_logits,
    picture,
    their_answers,
    their_embeddings,
    their_logits,
    turn,
    variant,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from video_llava_tiny import KINDS, MORE, PREPROCESSOR, TALKS, of_inputs, opened, their_inputs

import minivlm
from minivlm import decoder, fuse
from minivlm.errors import MinivlmError
from minivlm.models import video_llava
from minivlm.vit import ViT

SIZES = [(40, 40), (39, 41), (41, 39), (2, 2), (37, 1), (1, 1), (1, 37), (3, 77), (80, 40), (33, 171), (257, 90)]
MISREAD = [(1, 1), (1, 37), (3, 77)]  # by their image processor, which takes so few rows for colours


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_ids_of_a_picture_equal_transformers(size):
    checkpoint, vlm = opened()
    talk = [turn("user", picture(*size), "What do you see?")]
    ours = vlm.preprocess([talk])
    if size in MISREAD:
        clip = CLIPImageProcessorPil(size=PREPROCESSOR["size"], crop_size=PREPROCESSOR["crop_size"])
        assert torch.equal(ours.pixel_values, clip(picture(*size), return_tensors="pt")["pixel_values"])
        talk = [turn("user", picture(40, 40), "What do you see?")]
        assert torch.equal(ours.input_ids, their_inputs(checkpoint.processor, [talk])["input_ids"])
    else:
        theirs = their_inputs(checkpoint.processor, [talk])
        assert torch.equal(ours.pixel_values, theirs["pixel_values"])
        assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert ours.image_sizes.tolist() == [list(size)]


@pytest.mark.parametrize("num_frames", [1, 5, 8, 13, 24])
def test_films_equal_transformers(num_frames):
    """Ids, pixels, features, logits, and 16 greedy tokens."""
    checkpoint, vlm = opened()
    talk = [turn("user", film(num_frames), "What moves?")]
    ours, theirs = vlm.preprocess([talk]), their_inputs(checkpoint.processor, [talk])
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.pixel_values_videos, theirs["pixel_values_videos"][0])
    assert ours.video_sizes.tolist() == [num_frames]
    with torch.inference_mode():
        wanted = checkpoint.theirs.model.get_video_features(theirs["pixel_values_videos"], return_dict=True)
        assert close(vlm.model.encode_videos(ours), wanted.pooler_output.flatten(0, 1))
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))
    answers = their_answers(checkpoint.theirs, theirs, vlm.eos_ids, vlm.processor.tokenizer.pad_id, max_new_tokens=16)
    assert [vlm.generate(talk, max_new_tokens=16).token_ids] == answers


@pytest.mark.parametrize("name", KINDS)
def test_every_seam_equals_transformers(name):
    checkpoint, vlm = opened(name)
    config, model = vlm.model.config.llava, checkpoint.theirs.model
    ours, theirs = vlm.preprocess(TALKS), their_inputs(checkpoint.processor, TALKS)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert torch.equal(ours.pixel_values_videos, theirs["pixel_values_videos"].flatten(0, 1))
    with torch.inference_mode():
        states = model.video_tower(ours.pixel_values_videos, output_hidden_states=True).hidden_states
        features = vlm.model.video_tower(ours.pixel_values_videos, config.feature_layers, drop_class_token=False)
        assert close(features, torch.cat([states[i] for i in config.feature_layers], -1))
        wanted = model.get_image_features(theirs["pixel_values"], return_dict=True).pooler_output
        assert close(vlm.model.encode_images(ours), wanted.flatten(0, 1))
        wanted = model.get_video_features(theirs["pixel_values_videos"], return_dict=True).pooler_output
        assert close(vlm.model.encode_videos(ours), wanted.flatten(0, 1))
        assert close(vlm.model.embed(ours), their_embeddings(checkpoint.theirs, theirs))
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))


def test_a_rendered_prompt_has_the_ids_of_transformers():
    checkpoint, vlm = opened()
    images = {"return_legacy_image_output": False}
    for text in ("<video>\nA film of", "<s>USER: <image> <video> <image>ASSISTANT:", "Nothing"):
        pictures, films = [picture(47, 91), picture(9, 8)][: text.count("<image>")], [film(2)][: text.count("<video>")]
        theirs = checkpoint.processor(
            text=text, images=pictures or None, videos=[np.stack(f) for f in films] or None, return_tensors="pt",
            add_special_tokens=not text.startswith("<s>"), images_kwargs=images,
        )  # fmt: skip
        assert torch.equal(vlm.preprocess([minivlm.Prompt(text, pictures, films)]).input_ids, theirs["input_ids"])


def test_a_folder_without_a_template_gets_the_published_one(tmp_path):
    checkpoint, vlm = opened()
    other = load(variant(checkpoint.folder, tmp_path / "bare", drop=["chat_template*"]))
    system = [{"role": "system", "content": "Be brief. "}, *TALKS[5]]
    assert torch.equal(other.preprocess([*TALKS, system]).input_ids, vlm.preprocess([*TALKS, system]).input_ids)


# --- parity with their video processor, which does not run here -------------------------------------------------------

STORED = np.load(Path(__file__).parent / "fixtures/video_llava_videos/films.npz")
STORED_FILMS = {1: (47, 91), 5: (40, 40), 8: (60, 53), 13: (40, 61), 24: (97, 64)}  # frames: (height, width)


def grey_levels(pixels):
    mean, std = (torch.tensor(PREPROCESSOR[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("num_frames", STORED_FILMS)
def test_films_equal_their_video_processor_but_for_its_way_to_resize(num_frames):
    """Pillow's resize and torchvision's differ by up to two grey levels; where nothing is resized, nothing differs."""
    _, vlm = opened()
    size = STORED_FILMS[num_frames]
    inputs = vlm.preprocess([[turn("user", film(num_frames, *size), "What?")]])
    ours, theirs = grey_levels(inputs.pixel_values_videos), torch.from_numpy(STORED[f"pixels_{num_frames}"])
    assert close(ours, theirs.float(), atol=2.01 if min(size) != 40 else 1e-3)
    assert int((inputs.input_ids == vlm.model.config.video_token_id).sum()) == STORED[f"tokens_{num_frames}"]


@pytest.mark.parametrize("settings", [{"resample": 2}, {"size": 42}, {"do_center_crop": False, "size": [40, 40]}])
def test_another_way_to_resize_is_not_theirs(settings):
    _, vlm = opened()
    inputs = vlm.preprocess([[turn("user", film(24, 97, 64), "What?")]], images_kwargs=settings)
    assert not close(grey_levels(inputs.pixel_values_videos), torch.from_numpy(STORED["pixels_24"]).float(), atol=4)


# --- the twins: what must break parity --------------------------------------------------------------------------------


def broken(talks=TALKS):
    """(ours, theirs) of a model that a test has harmed."""
    checkpoint, vlm = opened()
    inputs = vlm.preprocess(talks)
    return our_logits(vlm, inputs), their_logits(checkpoint.theirs, of_inputs(inputs))


def test_nothing_is_broken_at_first():
    assert close(*broken())


def test_towers_exchanged_break_parity(monkeypatch):
    _, vlm = opened()
    image_tower, video_tower = vlm.model.image_tower, vlm.model.video_tower
    for one, other, talk in (("image_tower", video_tower, TALKS[0]), ("video_tower", image_tower, TALKS[2])):
        with monkeypatch.context() as patch:
            patch.setitem(vlm.model._modules, one, other)
            assert not close(*broken([talk]), atol=1e-3)


def test_frames_without_their_class_token_do_not_fit(monkeypatch):
    """Neither the prompt of their processor nor, if the prompt is made to fit, its length."""
    checkpoint, vlm = opened()
    inputs, forward = vlm.preprocess([TALKS[2]]), ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda self, pixels, layers, **_: forward(self, pixels, layers, True))
    with pytest.raises(MinivlmError, match="208 image placeholders.* 200 image tokens"):
        vlm.model(inputs)
    monkeypatch.setattr(video_llava, "num_video_tokens", lambda _, frames: 25 * frames)
    ours, theirs = vlm.preprocess([TALKS[2]]), their_inputs(checkpoint.processor, [TALKS[2]])
    assert vlm.model(ours).shape[1] == theirs["input_ids"].shape[1] - 8


def test_pictures_with_their_class_token_do_not_fit(monkeypatch):
    _, vlm = opened()
    inputs, forward = vlm.preprocess([TALKS[0]]), ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda self, pixels, layers, _: forward(self, pixels, layers, False))
    with pytest.raises(MinivlmError, match="25 image placeholders.* 26 image tokens"):
        vlm.model(inputs)


WRONG_CONFIGS = {
    "the last layer": {"vision_feature_layer": -1},
    "two layers back": {"vision_feature_layer": -3},
    "another activation in the projector": {"projector_hidden_act": "relu"},
    "another activation in the towers": {"vision_config.hidden_act": "gelu"},
    "another eps in the towers": {"vision_config.layer_norm_eps": 1e-3},
    "other heads in the towers": {"vision_config.num_attention_heads": 4},
    "another theta": {"text_config.rope_theta": 5e5},
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
@pytest.mark.parametrize("talk", [TALKS[0], TALKS[2]], ids=["picture", "film"])
def test_another_number_in_the_config_breaks_parity(tmp_path, change, talk):
    checkpoint, vlm = opened()
    other = load(variant(checkpoint.folder, tmp_path / "changed", WRONG_CONFIGS[change]))
    inputs = vlm.preprocess([talk])
    assert not close(our_logits(other, inputs), their_logits(checkpoint.theirs, of_inputs(inputs)), atol=1e-3)


def seen_as(change):
    """`fuse` with other tokens, or in other places."""
    return lambda patch: patch.setattr(fuse, "fuse", lambda x, where, tokens: change(x, where[..., None], tokens))


TRAPS = {
    "no mask": lambda patch: patch.setattr(decoder, "causal_mask", lambda *_: None),
    "frames in another order": seen_as(
        lambda x, where, tokens: x.masked_scatter(where, tokens.view(-1, 26, 48).flip(0).flatten(0, 1))
    ),
    "the class token behind its frame": seen_as(
        lambda x, where, tokens: x.masked_scatter(where, tokens.view(-1, 26, 48).roll(-1, 1).flatten(0, 1))
    ),
    "nothing seen": seen_as(lambda x, where, _: x.masked_fill(where, 0)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_breaks_parity(monkeypatch, trap):
    TRAPS[trap](monkeypatch)
    assert not close(*broken([TALKS[2], TALKS[4]]), atol=1e-3)


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_pictures_and_films_give_the_same_tokens_in_any_company():
    _, vlm = opened()
    model, together = vlm.model, vlm.preprocess([*TALKS, *MORE])
    pictures, films = media([*TALKS, *MORE], "image"), media([*TALKS, *MORE], "video")
    assert together.video_sizes.tolist() == [len(f) for f in films]
    with torch.inference_mode():
        for own, tokens in zip(pictures, model.encode_images(together).split(25), strict=True):
            assert close(tokens, model.encode_images(vlm.preprocess([[turn("user", own, "Look.")]])), atol=2e-5)
        for own, tokens in zip(films, model.encode_videos(together).split([26 * len(f) for f in films]), strict=True):
            assert close(tokens, model.encode_videos(vlm.preprocess([[turn("user", own, "Look.")]])), atol=2e-5)


def test_frames_are_seen_as_pictures_are_but_by_another_tower(monkeypatch):
    _, vlm = opened()
    frames = film(3)
    as_film, as_pictures = (vlm.preprocess([[turn("user", *seen, "?")]]) for seen in ([frames], frames))
    assert torch.equal(as_film.pixel_values_videos, as_pictures.pixel_values)
    monkeypatch.setitem(vlm.model._modules, "image_tower", vlm.model.video_tower)
    with torch.inference_mode():
        tokens = vlm.model.encode_videos(as_film).view(3, 26, -1)
        assert close(tokens[:, 1:].flatten(0, 1), vlm.model.encode_images(as_pictures))


@given(st.integers(1, 64))
def test_every_film_is_as_many_tokens_as_theirs(num_frames):
    checkpoint, vlm = opened()
    pixels = {"pixel_values_videos": np.zeros((1, num_frames, 3, 40, 40), dtype=np.uint8)}
    theirs = checkpoint.processor.replace_video_token(pixels, 0).count("<video>")
    assert video_llava.num_video_tokens(vlm.model.config, num_frames) == theirs
    inputs = vlm.preprocess([[turn("user", film(num_frames, 5, 4), "?")]])
    assert int((inputs.input_ids == vlm.model.config.video_token_id).sum()) == theirs
    assert len(inputs.pixel_values_videos) == num_frames


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_every_picture_is_as_many_tokens_as_theirs(height, width):
    checkpoint, vlm = opened()
    pixels = CLIPImageProcessorPil(size=PREPROCESSOR["size"], crop_size=PREPROCESSOR["crop_size"])
    small = picture(-(-height // 100), -(-width // 100))
    theirs = checkpoint.processor.replace_image_token(pixels(small, return_tensors="np"), 0).count("<image>")
    assert video_llava.num_image_tokens(vlm.model.config) == theirs


@pytest.mark.parametrize("name", KINDS)
def test_the_token_counts_are_what_the_towers_give(name):
    _, vlm = opened(name)
    inputs, config = vlm.preprocess([TALKS[5]]), vlm.model.config
    with torch.inference_mode():
        assert len(vlm.model.encode_images(inputs)) == 2 * video_llava.num_image_tokens(config)
        assert len(vlm.model.encode_videos(inputs)) == video_llava.num_video_tokens(config, 8)


@pytest.mark.parametrize("field, told", [("pixel_values", "25 image.* 0"), ("pixel_values_videos", "208 image.* 0")])
def test_a_placeholder_without_its_picture_or_film_is_an_error(field, told):
    _, vlm = opened()
    inputs = vlm.preprocess([TALKS[0], TALKS[2]])
    setattr(inputs, field, None)
    with pytest.raises(MinivlmError, match=told):
        vlm.model(inputs)


def test_every_parameter_that_is_run_learns():
    _, vlm = opened()
    model, inputs = vlm.model, vlm.preprocess([TALKS[5]])
    try:
        model.requires_grad_(True)
        model(inputs).logsumexp(-1).sum().backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        towers, parts = ("image_tower", "video_tower"), ("encoder.layers.3", "post_layernorm")
        behind = tuple(f"{tower}.{part}" for tower in towers for part in parts)
        assert idle == {name for name, _ in model.named_parameters() if name.startswith(behind)}
    finally:
        model.zero_grad()
        model.requires_grad_(False)
