"""What holds for every family: its answers are transformers', cached or not, in a batch or alone, from any folder.

What is one family's own is in test_<family>*.py: pixels, seams, and the twins that show that these comparisons bite.
"""

import llava_next_tiny
import llava_tiny
import mllama_tiny
import onevision_tiny
import pytest
import qwen2_vl_tiny
import tiny
import torch
import video_llava_tiny
from tiny import close, in_layout, load, our_logits, their_answers, their_logits, turn, whole_and_one_by_one

import minivlm
from minivlm.errors import MinivlmError

FAMILIES = {
    "llava": llava_tiny, "video_llava": video_llava_tiny, "llava_next": llava_next_tiny,
    "llava_onevision": onevision_tiny, "qwen2_vl": qwen2_vl_tiny, "mllama": mllama_tiny,
}  # fmt: skip
MORE = {"video_llava": video_llava_tiny.MORE, "llava_onevision": onevision_tiny.MORE}  # that only we can take
KINDS = [(family, kind) for family, tested in FAMILIES.items() for kind in tested.KINDS]
STORED = [  # of each family one with a head of its own, and one without where there is such
    ("llava", "hub"), ("llava", "grouped heads, tied"), ("video_llava", "hub"),
    ("video_llava", "no bias, relu, grouped heads, tied"), ("llava_next", "mistral"),
    ("llava_next", "qwen with a window"), ("llava_onevision", "0.5b"), ("llava_onevision", "7b"),
    ("qwen2_vl", "untied"), ("qwen2_vl", "tied"), ("mllama", "hub"),
]  # fmt: skip
HARMED = {  # some of each family's tensors, by transformers' names
    "llava": ("lm_head.weight", "model.multi_modal_projector.linear_2.bias", "model.language_model.norm.weight"),
    "video_llava": ("model.image_tower.embeddings.class_embedding", "model.video_tower.encoder.layers.3.mlp.fc2.bias"),
    "llava_next": ("model.image_newline", "model.vision_tower.pre_layrnorm.weight"),
    "llava_onevision": ("model.image_newline", "model.vision_tower.encoder.layers.3.mlp.fc2.bias"),
    "qwen2_vl": ("model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"),
    "mllama": (
        "model.vision_model.class_embedding", "model.vision_model.gated_positional_embedding.gate",
        "model.vision_model.global_transformer.layers.1.gate_ffn", "model.multi_modal_projector.bias", "lm_head.weight",
        "model.language_model.layers.1.cross_attn.q_norm.weight", "model.language_model.layers.3.cross_attn_mlp_gate",
    ),
}  # fmt: skip
LAYOUTS = {family: qwen2_vl_tiny.LAYOUTS if family == "qwen2_vl" else tiny.LAYOUTS for family in FAMILIES}


def opened(family, kind):
    """(checkpoint, ours, conversations, what their processor makes of these)"""
    tested = FAMILIES[family]
    checkpoint, vlm = tested.opened(kind)
    return checkpoint, vlm, tested.TALKS, tested.their_inputs(checkpoint.processor, tested.TALKS)


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family, kind", KINDS)
def test_generated_tokens_equal_transformers(family, kind, num_beams):
    checkpoint, vlm, talks, inputs = opened(family, kind)
    search = {"num_beams": num_beams, "max_new_tokens": 16}
    theirs = their_answers(checkpoint.theirs, inputs, vlm.eos_ids, vlm.processor.tokenizer.pad_id, **search)
    assert [result.token_ids for result in vlm.generate(talks, **search)] == theirs


@pytest.mark.parametrize("family, kind", KINDS)
def test_logits_are_of_a_size_that_the_tolerance_means_something(family, kind):
    _, vlm, talks, _ = opened(family, kind)
    assert 0.5 < our_logits(vlm, vlm.preprocess(talks)).std() < 10


@pytest.mark.parametrize("family, kind", KINDS)
def test_cached_steps_equal_the_full_forward(family, kind):
    _, vlm, talks, _ = opened(family, kind)
    assert close(*whole_and_one_by_one(vlm, talks + MORE.get(family, []), 14), atol=2e-5)


@pytest.mark.parametrize("family, kind", KINDS)
def test_a_batch_gives_what_its_rows_give_alone(family, kind):
    _, vlm, talks, _ = opened(family, kind)
    talks = talks + MORE.get(family, [])
    alone = torch.cat([our_logits(vlm, vlm.preprocess([talk])) for talk in talks])
    assert close(our_logits(vlm, vlm.preprocess(talks)), alone, atol=2e-5)


# --- from any folder --------------------------------------------------------------------------------------------------


def reload(family, folder):
    theirs = tiny.reload(folder)
    return mllama_tiny.patched(theirs) if family == "mllama" else theirs


@pytest.mark.parametrize(
    "family, kind, layout",
    [(*stored, layout) for stored in STORED for layout in [*LAYOUTS[stored[0]], *tiny.OTHER_FOLDERS]],
)
def test_every_key_layout_gives_the_same_logits(tmp_path, family, kind, layout):
    checkpoint, vlm, talks, _ = opened(family, kind)
    other = load(in_layout(checkpoint, layout, tmp_path / "other"))
    assert torch.equal(our_logits(other, other.preprocess(talks)), our_logits(vlm, vlm.preprocess(talks)))


@pytest.mark.parametrize("family, layout", [(family, layout) for family in FAMILIES for layout in LAYOUTS[family]])
def test_transformers_reads_the_layouts_that_these_tests_write(tmp_path, family, layout):
    checkpoint, _, _, inputs = opened(family, None)
    again = reload(family, in_layout(checkpoint, layout, tmp_path / "other"))
    assert close(their_logits(again, inputs), their_logits(checkpoint.theirs, inputs))


@pytest.mark.parametrize("family, kind", KINDS)
def test_transformers_reads_what_we_save(tmp_path, family, kind):
    checkpoint, vlm, talks, inputs = opened(family, kind)
    vlm.save(tmp_path / "saved")
    again = reload(family, tmp_path / "saved")
    assert close(their_logits(again, inputs), their_logits(checkpoint.theirs, inputs), atol=1e-6)
    ours = vlm.preprocess(talks)
    assert torch.equal(our_logits(load(tmp_path / "saved"), ours), our_logits(vlm, ours))


@pytest.mark.parametrize("layout", ["hub", "4.52"])
@pytest.mark.parametrize("family, name", [(family, name) for family, names in HARMED.items() for name in names])
def test_a_tensor_that_is_missing_misshapen_or_too_many_is_named(tmp_path, family, name, layout):
    """In full where it is spelled as the hub spells it. A layer more than the config says is too many, too."""
    checkpoint, _ = FAMILIES[family].opened()
    folder = tiny.variant(checkpoint.folder, tmp_path / "damaged", drop=["*.safetensors"])
    tensors = tiny.tensors_of(checkpoint.theirs, layout, checkpoint.layouts)
    harmed = tensors.pop(name := tiny.rename(name, layout, checkpoint.layouts))
    more = name.replace("layers.3.", "layers.4.") if "layers.3." in name else name + "s"
    for damage in ({}, {name: harmed[:0].clone()}, {name: harmed, more: harmed.clone()}):
        tiny.save_tensors(tensors | damage, folder)
        told = more if more in damage else name
        tail = ".".join(told.removeprefix("model.").split(".")[-2:])
        with pytest.raises(MinivlmError, match=told if layout == "hub" else tail) as error:
            load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_vision_its_weights_are_never_read(tmp_path, family):
    """They may be missing from the disk; in memory there is nothing of them."""
    checkpoint, vlm, talks, _ = opened(family, None)
    folder = tiny.variant(checkpoint.folder, tmp_path / "blind", drop=["*.safetensors"])
    tensors = tiny.tensors_of(checkpoint.theirs, "hub", checkpoint.layouts)
    text = ("language_model.", "model.", "lm_head.")
    tiny.save_tensors({name: tensor for name, tensor in tensors.items() if name.startswith(text)}, folder)
    blind = minivlm.load(folder, device="cpu", dtype="float32", vision=False)
    assert all(p.is_meta != name.startswith("language_model.") for name, p in blind.model.named_parameters())
    words = [[turn("user", "Hello!")]]
    assert torch.equal(our_logits(blind, blind.preprocess(words)), our_logits(vlm, vlm.preprocess(words)))
    assert blind.chat("Hello?", max_new_tokens=4) == vlm.chat("Hello?", max_new_tokens=4)
    seen = [part for talk in talks for message in talk for part in message["content"] if part["type"] != "text"]
    for part in {part["type"]: part for part in seen}.values():
        with pytest.raises(MinivlmError, match="vision=False"):
            blind.preprocess([[{"role": "user", "content": [part]}]])
