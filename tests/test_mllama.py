"""Mllama against transformers held to Meta's rules: every seam, gates, who may see what."""

import pytest
import tiny
import torch
from mllama_tiny import RATIOS, TALKS, opened, patched, their_inputs
from tiny import close, load, our_logits, picture, reload, turn

from minivlm import Prompt
from minivlm.cache import KVCache
from minivlm.models import mllama
from minivlm.models.mllama import CrossAttention

SIZES = [  # one at least for each aspect ratio, and some that are hard
    (40, 40), (40, 80), (40, 120), (40, 160), (80, 40), (80, 80), (120, 40), (160, 40),
    (39, 41), (1, 1), (1, 300), (300, 1), (33, 171), (257, 90), (500, 500),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint():
    return opened()[0]


@pytest.fixture(scope="module")
def vlm():
    return opened()[1]


def check_inputs(ours, theirs):
    for name, tensor in theirs.items():
        assert torch.equal(getattr(ours, name), tensor), name


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_and_tower_equal_transformers(checkpoint, vlm, size):
    talk = [turn("user", picture(*size), "What do you see?")]
    ours, theirs = vlm.preprocess([talk]), their_inputs(checkpoint.processor, [talk])
    check_inputs(ours, theirs)
    with torch.inference_mode():
        vision = {name: theirs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        wanted = checkpoint.theirs.model.vision_model(**vision).last_hidden_state[0, 0]  # (tiles, P, channels)
        count = int(theirs["aspect_ratio_mask"].sum())
        features = vlm.model.vision_model(ours.pixel_values[0, 0], ours.aspect_ratio_ids[0, 0], count)
        assert close(features, wanted[:count].flatten(0, 1))
        assert close(
            vlm.model.encode_images(ours), checkpoint.theirs.model.multi_modal_projector(wanted[:count]).flatten(0, 1)
        )


def test_the_sizes_have_every_aspect_ratio(vlm):
    talks = [[turn("user", picture(*size))] for size in SIZES]
    assert set(vlm.preprocess(talks).aspect_ratio_ids.flatten().tolist()) == set(range(1, 9))


def test_a_batch_of_no_one_and_three_pictures_equals_transformers(checkpoint, vlm):
    ours, theirs = vlm.preprocess(TALKS), their_inputs(checkpoint.processor, TALKS)
    check_inputs(ours, theirs)
    assert ours.aspect_ratio_ids.shape == (4, 3)
    assert close(our_logits(vlm, ours), tiny.their_logits(checkpoint.theirs, theirs))


def test_text_alone_equals_transformers(checkpoint, vlm):
    ours, theirs = vlm.preprocess(TALKS[1:2]), their_inputs(checkpoint.processor, TALKS[1:2])
    check_inputs(ours, theirs)
    assert ours.pixel_values is None
    assert close(our_logits(vlm, ours), tiny.their_logits(checkpoint.theirs, theirs))


PROMPTS = {  # text → whether the reference's tokenizer is to add a BOS: not where the text begins with one
    "<|image|>If I had to write": True,
    "<|image|><|image|><|begin_of_text|>Both": True,
    "<|begin_of_text|>Look: <|image|> and": False,
    "Look: <|image|> and <|image|>": False,
    "no picture": False,
}


@pytest.mark.parametrize("text", PROMPTS)
def test_raw_prompts_equal_transformers(checkpoint, vlm, text):
    pictures = [picture(50, 90, seed) for seed in range(text.count("<|image|>"))]
    theirs = checkpoint.processor(
        text=[text], images=[pictures] if pictures else None, return_tensors="pt", add_special_tokens=PROMPTS[text]
    )
    ours = vlm.preprocess([Prompt(text, images=pictures)])
    check_inputs(ours, theirs)
    assert close(our_logits(vlm, ours), tiny.their_logits(checkpoint.theirs, theirs))


# --- the twins: what must break parity --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted(checkpoint):
    return tiny.their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))


WRONG_CONFIGS = {
    "the states that leave the layers": {"vision_config.intermediate_layers_indices": [2, 1, 3]},
    "another rotary scaling": {"text_config.rope_scaling.factor": 1.0, "text_config.rope_theta": 1e4},
    "ratios in another order": {"vision_config.supported_aspect_ratios": RATIOS[::-1]},
    "another eps": {"text_config.rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_another_number_in_the_config_breaks_parity(checkpoint, wanted, tmp_path, change):
    other = load(tiny.variant(checkpoint.folder, tmp_path / "changed", WRONG_CONFIGS[change]))
    assert not close(our_logits(other, other.preprocess(TALKS)), wanted, atol=1e-3)


GATES = [
    "cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn", "gated_positional_embedding.gate",
    "pre_tile_positional_embedding.gate", "post_tile_positional_embedding.gate", "q_norm", "k_norm",
]  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
def test_gates_at_zero_and_norms_at_one_break_parity(checkpoint, wanted, gate):
    other = load(checkpoint.folder)
    with torch.no_grad():
        for name, p in other.model.named_parameters():
            if gate in name:
                p.fill_(float("norm" in gate))
    assert not close(our_logits(other, other.preprocess(TALKS)), wanted, atol=1e-3)


def test_padding_seen_by_padding_breaks_parity(wanted, vlm, monkeypatch):
    """The tower without its mask: every patch looks at every other."""
    forward = mllama.VisionAttention.forward
    monkeypatch.setattr(mllama.VisionAttention, "forward", lambda self, x, _: forward(self, x, x.shape[1]))
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), wanted, atol=1e-3)


def test_pictures_seen_from_everywhere_break_parity(wanted, vlm):
    ours = vlm.preprocess(TALKS)
    ours.cross_attention_mask = ours.cross_attention_mask.amax(1, keepdim=True).expand_as(ours.cross_attention_mask)
    assert not close(our_logits(vlm, ours), wanted, atol=1e-3)


@pytest.mark.parametrize("left_out", ["entering", "silent"])
def test_transformers_as_it_is_is_another_model(checkpoint, wanted, left_out):
    """Each of the two patches matters: without it, the same weights say something else."""
    half = patched(reload(checkpoint.folder), **{left_out: False})
    theirs = their_inputs(checkpoint.processor, TALKS)
    assert not close(tiny.their_logits(half, theirs), wanted, atol=1e-2)


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_text_before_a_picture_is_as_if_there_were_none(vlm):
    before = "<|begin_of_text|>Some text before"
    with torch.inference_mode():
        plain = vlm.model(vlm.preprocess([Prompt(before)]))
        seeing = vlm.model(vlm.preprocess([Prompt(before + "<|image|> it", images=[picture(50, 50)])]))
    assert close(seeing[:, : plain.shape[1]], plain, atol=2e-5)


def test_two_pictures_give_different_answers(vlm):
    answers = {vlm.chat("What is this?", [picture(60, 60, seed)], max_new_tokens=8) for seed in range(3)}
    assert len(answers) == 3


def test_cross_keys_and_values_are_computed_once(vlm, monkeypatch):
    calls, remember = [], CrossAttention.remember
    monkeypatch.setattr(CrossAttention, "remember", lambda self, x: calls.append(x.shape) or remember(self, x))
    vlm.generate(TALKS, max_new_tokens=6, num_beams=2)
    inputs = vlm.preprocess(TALKS)
    tiles = inputs.cross_attention_mask.amax(1).sum((1, 2))  # of each row: no padding tile has keys
    assert calls == [(4, int(tiles.max()) * 26, 48)] * 2  # two cross-attention layers; not once per token or beam


def test_no_state_stays_on_the_model(vlm):
    caches = [vlm.model.new_cache(), vlm.model.new_cache()]
    step = torch.tensor([[5]])
    with torch.inference_mode():
        for cache, talk in zip(caches, TALKS[:2], strict=True):
            vlm.model(vlm.preprocess([talk]), cache)
        apart = KVCache(5)
        vlm.model(vlm.preprocess(TALKS[:1]), apart)
        assert caches[1].memory == {}
        assert torch.equal(vlm.model.decode(step, caches[0]), vlm.model.decode(step, apart))
