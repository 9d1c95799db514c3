"""LLaVA-1.5 against transformers at every seam: pixels, ids, features, embeddings, logits; and its own laws."""

import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from llava_tiny import KINDS, TALKS, opened
from tiny import close, load, our_logits, picture, their_embeddings, their_inputs, their_logits, turn
from transformers import AutoConfig

import minivlm
from minivlm import decoder, fuse
from minivlm.errors import MinivlmError
from minivlm.models import llava
from minivlm.models.llava import LlavaConfig

SIZES = [(40, 40), (39, 41), (41, 39), (1, 1), (1, 37), (60, 1), (80, 40), (33, 171), (257, 90), (119, 121)]


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_ids_equal_transformers(size):
    checkpoint, vlm = opened()
    talk = [turn("user", picture(*size), "What do you see?")]
    ours, theirs = vlm.preprocess([talk]), their_inputs(checkpoint.processor, [talk])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert torch.equal(ours.input_ids, theirs["input_ids"])


def test_a_rendered_prompt_has_the_ids_of_transformers():
    checkpoint, vlm = opened()
    for text in ("<image>\nA photo of", "<s>USER: <image> <image>ASSISTANT:", "No picture"):
        pictures = [picture(47, 91), picture(9, 8)][: text.count("<image>")]
        theirs = checkpoint.processor(
            text=text, images=pictures or None, return_tensors="pt", add_special_tokens=not text.startswith("<s>")
        )
        assert torch.equal(vlm.preprocess([minivlm.Prompt(text, pictures)]).input_ids, theirs["input_ids"])


def test_a_folder_without_a_template_gets_the_published_one(tmp_path):
    checkpoint, vlm = opened()
    other = load(tiny.variant(checkpoint.folder, tmp_path / "bare", drop=["chat_template*"]))
    assert torch.equal(other.preprocess(TALKS).input_ids, vlm.preprocess(TALKS).input_ids)


@pytest.mark.parametrize("name", KINDS)
def test_every_seam_equals_transformers(name):
    """A left-padded batch: one picture, none, three over two turns, and the smallest."""
    checkpoint, vlm = opened(name)
    config, model = vlm.model.config, checkpoint.theirs.model
    ours, theirs = vlm.preprocess(TALKS), their_inputs(checkpoint.processor, TALKS)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    with torch.inference_mode():
        states = model.vision_tower(theirs["pixel_values"], output_hidden_states=True).hidden_states
        wanted = torch.cat([states[i] for i in config.feature_layers], -1)[:, int(config.drop_class_token) :]
        features = vlm.model.vision_tower(ours.pixel_values, config.feature_layers, config.drop_class_token)
        assert close(features, wanted)
        projected = model.get_image_features(theirs["pixel_values"], return_dict=True).pooler_output
        assert close(vlm.model.encode_images(ours), torch.cat(tuple(projected)))
        assert close(vlm.model.embed(ours), their_embeddings(checkpoint.theirs, theirs))
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))


# --- the twins: what must break parity --------------------------------------------------------------------------------

WRONG_CONFIGS = {
    "the last layer": {"vision_feature_layer": -1},
    "two layers back": {"vision_feature_layer": -3},
    "another activation in the projector": {"projector_hidden_act": "relu"},
    "another activation in the tower": {"vision_config.hidden_act": "gelu_pytorch_tanh"},
    "another activation in the decoder": {"text_config.hidden_act": "gelu"},
    "another eps": {"text_config.rms_norm_eps": 1e-3},
    "another eps in the tower": {"vision_config.layer_norm_eps": 1e-3},
    "another theta": {"text_config.rope_theta": 5e5},
    "squeezed positions": {"text_config.rope_scaling": {"type": "linear", "factor": 2.0}},
    "other heads": {"text_config.num_attention_heads": 8, "text_config.num_key_value_heads": 8},
    "other heads in the tower": {"vision_config.num_attention_heads": 4},
    "a window": {
        "text_config.model_type": "mistral", "text_config.num_key_value_heads": 4, "text_config.sliding_window": 9,
    },
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_another_number_in_the_config_breaks_parity(tmp_path, change):
    checkpoint, _ = opened()
    vlm = load(tiny.variant(checkpoint.folder, tmp_path / "changed", WRONG_CONFIGS[change]))
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


TRAPS = {
    "no mask": lambda patch: patch.setattr(decoder, "causal_mask", lambda *_: None),
    "looking ahead": lambda patch: patch.setattr(
        decoder, "causal_mask", lambda T, S, *_: torch.ones(1, 1, T, S, dtype=torch.bool)
    ),
    "positions that count padding": lambda patch: patch.setattr(
        decoder, "text_positions", lambda mask: torch.arange(mask.shape[1]).expand_as(mask) * 2
    ),
    "pictures in another order": lambda patch: patch.setattr(
        fuse, "fuse", lambda x, where, tokens: x.masked_scatter(where[..., None], tokens.flip(0))
    ),
    "no pictures": lambda patch: patch.setattr(fuse, "fuse", lambda x, *_: x),
    "colours swapped": lambda patch: patch.setattr(
        llava, "to_pixels", lambda image, config, original=llava.to_pixels: original(image, config).flip(0)
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_breaks_parity(monkeypatch, trap):
    checkpoint, vlm = opened()
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    TRAPS[trap](monkeypatch)
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_a_picture_gives_the_same_tokens_in_any_company():
    _, vlm = opened()
    pictures = [picture(47, 91), picture(200, 41, 3), picture(1, 1)]
    together = vlm.preprocess([[turn("user", *pictures, "Compare.")]])
    with torch.inference_mode():
        ours = vlm.model.encode_images(together).chunk(len(pictures))
        for tokens, own in zip(ours, pictures, strict=True):
            assert close(tokens, vlm.model.encode_images(vlm.preprocess([[turn("user", own, "Describe.")]])), atol=2e-5)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_every_picture_is_as_many_tokens_as_theirs(height, width):
    checkpoint, vlm = opened()
    (theirs,) = checkpoint.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
    assert llava.num_image_tokens(vlm.model.config) == theirs


@pytest.mark.parametrize("name", KINDS)
def test_the_token_count_is_what_the_tower_gives(name):
    _, vlm = opened(name)
    inputs = vlm.preprocess([TALKS[0]])
    tokens = vlm.model.encode_images(inputs)
    assert len(tokens) == llava.num_image_tokens(vlm.model.config)
    assert len(tokens) == int((inputs.input_ids == vlm.model.config.image_token_id).sum())


def test_a_placeholder_without_its_picture_is_an_error():
    _, vlm = opened()
    inputs = vlm.preprocess([TALKS[0]])
    inputs.pixel_values = None
    with pytest.raises(MinivlmError, match="25 image placeholders.* 0 image tokens"):
        vlm.model(inputs)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_packed_bf16_model_answers_alike_and_saves_what_it_loaded(tmp_path):
    checkpoint, vlm = opened()
    packed = minivlm.load(checkpoint.folder, device="cpu", dtype="bfloat16")
    assert packed.model.language_model.lm_head.packed is not None
    ours = our_logits(packed, packed.preprocess(TALKS))
    wanted = our_logits(vlm, vlm.preprocess(TALKS))
    assert (ours - wanted).abs().mean() < 0.05 < wanted.abs().mean() / 10
    packed.save(tmp_path / "saved")
    saved = load(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(saved[name], p.bfloat16().float()) for name, p in vlm.model.state_dict().items())


# --- configs ----------------------------------------------------------------------------------------------------------


SPARSE = {  # what a file may leave out
    "hardly more than the types": {
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model"},
    },
    "nothing but the type": {},
    "no types": {"text_config": {"vocab_size": 99}, "vision_config": {"hidden_size": 96}},
    "an empty tower": {"vision_config": {}},
}  # fmt: skip


@pytest.mark.parametrize("sparse", SPARSE)
def test_what_a_config_leaves_out_is_what_transformers_takes(sparse):
    theirs = AutoConfig.for_model("llava", **json.loads(json.dumps(SPARSE[sparse])))
    full = json.loads(json.dumps(theirs.to_dict()))
    assert LlavaConfig.from_hf(SPARSE[sparse]) == LlavaConfig.from_hf(full)


def test_a_strategy_that_is_none_is_refused():
    with pytest.raises(MinivlmError, match="vision_feature_select_strategy"):
        LlavaConfig.from_hf({"vision_feature_select_strategy": "cls_patch"})


@pytest.mark.parametrize("layer", [5, -6, [-2, 9]])
def test_a_feature_layer_that_the_tower_has_not_is_refused(tmp_path, layer):
    """A wrapped index would read some other layer and answer a little worse."""
    checkpoint, _ = opened()
    with pytest.raises(MinivlmError, match="vision_feature_layer"):
        load(tiny.variant(checkpoint.folder, tmp_path / "changed", {"vision_feature_layer": layer}))


@pytest.mark.parametrize("settings", [{"crop_size": 32}, {"do_center_crop": False}], ids=str)
def test_pixels_that_the_tower_cannot_see_are_refused(settings):
    _, vlm = opened()
    with pytest.raises(MinivlmError, match="40 x 40"):
        vlm.preprocess(TALKS, images_kwargs=settings)
