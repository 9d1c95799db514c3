"""Mllama against transformers held to Meta's rules; tiles; gates; who may see what; its own checkpoints.

transformers 5 is another model in two places (`patched` says which), so the oracle is transformers with both put right.
"""

import itertools
import json

import pytest
import tiny
import tokenizers_tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import close, load, our_logits, picture, turn
from tokenizers_tiny import TEMPLATES
from transformers.models.mllama import image_processing_pil_mllama as their_tiles
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from minivlm import Prompt
from minivlm.cache import KVCache
from minivlm.errors import MinivlmError
from minivlm.image_config import CLIP_MEAN, CLIP_STD
from minivlm.models import mllama
from minivlm.models.mllama import CrossAttention, MllamaConfig, choose_canvas, fitted_size, sights

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
CONFIG = {
    "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "torch_dtype": "float16",
    "text_config": {
        "model_type": "mllama_text_model", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "cross_attention_layers": [1, 3], "tie_word_embeddings": False, "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {
        "model_type": "mllama_vision_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
        "num_global_layers": 2, "attention_heads": 2, "image_size": 40, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 0, 2], "vision_output_dim": 128, "supported_aspect_ratios": RATIOS,
    },
}  # fmt: skip
PREPROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "MllamaImageProcessor",
    "max_image_tiles": 4, "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 40, "width": 40},
}  # fmt: skip

TALKS = [
    [turn("user", picture(47, 191), "What is this?")],
    [turn("user", "Hello! No picture here.")],
    [turn("user", "Compare", picture(40, 40, 1), picture(230, 77, 2), "both."), turn("assistant", "The left one."),
     turn("user", picture(100, 101, 3), "And now?")],
    [turn("user", "Text before it:", picture(1, 1), "Which?")],
]  # fmt: skip
SIZES = [  # one at least for each aspect ratio, and some that are hard
    (40, 40), (40, 80), (40, 120), (40, 160), (80, 40), (80, 80), (120, 40), (160, 40),
    (39, 41), (1, 1), (1, 300), (300, 1), (33, 171), (257, 90), (500, 500),
]  # fmt: skip


def make(folder, config=CONFIG):
    """A checkpoint in the hub's layout, `<|image|>` the first id behind the vocabulary, as in the published ones."""
    tokenizer = tokenizers_tiny.llama3()
    tokenizers_tiny.save(tokenizer, folder, "llama3", TEMPLATES["mllama"])
    image_id = tokenizer.token_to_id("<|image|>")
    assert image_id == tokenizer.get_vocab_size() - 1
    ids = {
        "vocab_size": image_id, "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")],
        "pad_token_id": tokenizer.token_to_id("<|finetune_right_pad_id|>"),
    }  # fmt: skip
    config = config | {"image_token_index": image_id, "text_config": config["text_config"] | ids}
    theirs = tiny.build(config)
    feel_gates(theirs)
    tiny.save_tensors(tiny.tensors_of(theirs), folder)
    tiny.write_json(folder / "config.json", config)
    tiny.write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    return tiny.Checkpoint(
        folder, patched(theirs), transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    )  # fmt: skip


@torch.no_grad()
def feel_gates(model):
    """Gates start at zero, and tables of thousands of columns get small numbers: make both of them felt."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "gate" in name and p.numel() == 1:
            p.copy_(0.6 + 0.3 * torch.randn(1, generator=generator))
        elif "positional_embedding" in name:
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))


def patched(theirs, entering=True, silent=True):
    """transformers with Meta's rules in the two places where it has others.

    1. `intermediate_layers_indices` name the states that enter those layers; transformers ≥ 4.50 takes what leaves
       them. With the tower's input put in front of its states, index i is the state that enters layer i.
    2. A token that may see no picture gets nothing from cross-attention; transformers stops only the MLP, and lets
       such a token attend to every picture slot of the batch.
    """

    rows = []  # 1 for tokens that may see a picture, (B, T, 1), as the layer that runs now was told

    def with_input(_, args, output):
        output.hidden_states = (args[0], *output.hidden_states)
        return output

    def note(_, __, kwargs):
        rows[:] = [kwargs["full_text_row_masked_out_mask"][:, 0]]

    if entering:
        theirs.model.vision_model.transformer.register_forward_hook(with_input)
    for layer in [layer for layer in theirs.model.language_model.layers if hasattr(layer, "cross_attn")]:
        if silent:
            layer.register_forward_pre_hook(note, with_kwargs=True)
            layer.cross_attn.register_forward_hook(lambda _, __, output: (output[0] * rows[0], *output[1:]))
    return theirs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("mllama") / "checkpoint")


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return load(checkpoint.folder)


def their_inputs(processor, talks):
    """Their processor takes pictures row by row."""
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    pictures = [[part["image"] for m in talk for part in m["content"] if part["type"] == "image"] for talk in talks]
    return processor(
        text=texts, images=pictures if any(pictures) else None, padding=True, return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip


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


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_tokens_equal_transformers(checkpoint, vlm, num_beams):
    theirs = tiny.their_answers(
        checkpoint.theirs, their_inputs(checkpoint.processor, TALKS), vlm.eos_ids, vlm.processor.tokenizer.pad_id,
        num_beams=num_beams, max_new_tokens=16,
    )  # fmt: skip
    ours = [result.token_ids for result in vlm.generate(TALKS, num_beams=num_beams, max_new_tokens=16)]
    assert ours == theirs


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


def reload(folder):
    return transformers.MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("left_out", ["entering", "silent"])
def test_transformers_as_it_is_is_another_model(checkpoint, wanted, left_out):
    """Each of the two patches matters: without it, the same weights say something else."""
    half = patched(reload(checkpoint.folder), **{left_out: False})
    theirs = their_inputs(checkpoint.processor, TALKS)
    assert not close(tiny.their_logits(half, theirs), wanted, atol=1e-2)


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_cached_steps_equal_the_full_forward(vlm):
    """Every decode step of a left-padded batch gives the logits that the whole sequence gives at that place."""
    inputs, steps = vlm.preprocess(TALKS), 8
    ids = torch.randint(3, 250, (len(TALKS), steps), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = vlm.preprocess(TALKS)
        whole.input_ids = torch.cat([inputs.input_ids, ids], 1)
        whole.attention_mask = torch.cat([inputs.attention_mask, torch.ones_like(ids)], 1)
        last = inputs.cross_attention_mask[:, -1:]
        whole.cross_attention_mask = torch.cat([inputs.cross_attention_mask, *[last] * steps], 1)
        full = vlm.model(whole)[:, -steps - 1 :]
        cache = vlm.model.new_cache()
        assert close(vlm.model(inputs, cache, last_only=True)[:, 0], full[:, 0], atol=2e-5)
        for i in range(steps):
            assert close(vlm.model.decode(ids[:, i : i + 1], cache), full[:, i + 1], atol=2e-5)


def test_a_batch_gives_what_its_rows_give_alone(vlm):
    with torch.inference_mode():
        logits = vlm.model(vlm.preprocess(TALKS))
        for row, talk in enumerate(TALKS):
            alone = vlm.model(vlm.preprocess([talk]))[0]
            assert close(logits[row, -len(alone) :], alone, atol=2e-5)


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


# --- tiles ------------------------------------------------------------------------------------------------------------

sides = st.integers(1, 5000)


@given(height=sides, width=sides, tile=st.sampled_from([40, 448, 560]), most=st.integers(1, 5))
def test_canvas_and_size_equal_transformers(height, width, tile, most):
    ratios = their_tiles.get_all_supported_aspect_ratios(most)
    rows, columns = choose_canvas((height, width), ratios, tile)
    theirs = their_tiles.get_optimal_tiled_canvas(height, width, most, tile)
    assert (rows * tile, columns * tile) == theirs
    assert fitted_size((height, width), theirs, tile) == their_tiles.get_image_size_fit_to_canvas(
        height, width, *theirs, tile
    )


@pytest.mark.parametrize("kinds", [*itertools.product([0, 1], repeat=6)], ids=lambda kinds: "".join(map(str, kinds)))
def test_sights_equal_transformers(kinds):
    theirs = get_cross_attention_token_mask(kinds, 1)
    places = [i for i, kind in enumerate(kinds) if kind]
    assert sights(places, 6) == [(start, 6 if end == -1 else end) for start, end in theirs]


def test_fewer_tiles_are_enough(vlm):
    """Fewer tiles, but the ids stay those that the tower has learned."""
    talk = [[turn("user", picture(160, 40), "Hm?")]]
    ours = vlm.preprocess(talk, images_kwargs={"max_image_tiles": 2})
    assert ours.aspect_ratio_ids.tolist() == [[1 + RATIOS.index([2, 1])]]
    assert ours.aspect_ratio_mask.tolist() == [[[1, 1, 0, 0]]]
    assert torch.isfinite(our_logits(vlm, ours)).all()


REFUSED = [{"max_image_tiles": 5}, {"do_pad": False}, {"do_resize": False}, {"size": {"height": 40, "width": 80}},
           {"size": {"height": 80, "width": 80}}, {"image_grid_pinpoints": [[40, 40]]}]  # fmt: skip


@pytest.mark.parametrize("override", REFUSED, ids=str)
def test_image_settings_that_do_not_fit_are_refused(vlm, override):
    with pytest.raises(MinivlmError, match=r"max_image_tiles|pad|pinpoints|80 x 80"):
        vlm.preprocess(TALKS, images_kwargs=override)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_pictures_and_placeholders_must_match(vlm):
    with pytest.raises(MinivlmError, match="2 placeholders.*1 were given"):
        vlm.preprocess([Prompt("<|image|><|image|>?", images=[picture(40, 40)])])


def test_a_template_that_refuses_is_heard(vlm, monkeypatch):
    raising = "{{ raise_exception('Prompting with images is incompatible with system messages.') }}"
    monkeypatch.setattr(vlm.processor, "template", type(vlm.processor.template)(raising))
    with pytest.raises(MinivlmError, match="incompatible with system messages"):
        vlm.preprocess(TALKS)


def test_a_base_model_goes_on_with_a_text(checkpoint, tmp_path):
    base = load(tiny.variant(checkpoint.folder, tmp_path / "base", drop=["chat_template*"]))
    asked = base.preprocess([[turn("user", picture(40, 40), "If I")]])
    raw = base.preprocess([Prompt("<|image|>If I", images=[picture(40, 40)])])
    assert torch.equal(asked.input_ids, raw.input_ids)
    with pytest.raises(MinivlmError, match="base model"):
        base.preprocess([TALKS[2]])


def test_labels_stand_on_answers_and_never_on_pictures(vlm):
    inputs = vlm.preprocess([TALKS[2][:2]], labels=True)
    said = inputs.labels[inputs.labels >= 0]
    assert "The left one." in vlm.processor.tokenizer.decode(said.tolist())
    assert (said < vlm.model.config.image_token_id).all()


def test_a_loss_reaches_every_parameter(checkpoint):
    vlm = load(checkpoint.folder)
    vlm.model.requires_grad_(True)
    inputs = vlm.preprocess([TALKS[2][:2]], labels=True)
    logits = vlm.model(inputs)
    torch.nn.functional.cross_entropy(logits[0, :-1], inputs.labels[0, 1:]).backward()
    assert [name for name, p in vlm.model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hub", "v5", "hub in 3", "save_pretrained"])
def test_every_key_layout_gives_the_same_logits(checkpoint, vlm, tmp_path, layout):
    other = load(tiny.in_layout(checkpoint, layout, tmp_path / "other"))
    assert torch.equal(our_logits(other, other.preprocess(TALKS)), our_logits(vlm, vlm.preprocess(TALKS)))


def test_transformers_reads_what_we_save(checkpoint, vlm, wanted, tmp_path):
    vlm.save(tmp_path / "saved")
    again = patched(reload(tmp_path / "saved"))
    assert close(tiny.their_logits(again, their_inputs(checkpoint.processor, TALKS)), wanted, atol=1e-6)


HARMED = [
    "vision_model.class_embedding", "vision_model.gated_positional_embedding.gate", "multi_modal_projector.bias",
    "language_model.model.layers.1.cross_attn.q_norm.weight", "language_model.model.layers.3.cross_attn_mlp_gate",
    "vision_model.global_transformer.layers.1.gate_ffn", "language_model.lm_head.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", HARMED)
def test_what_is_missing_or_misshapen_is_named(checkpoint, tmp_path, name):
    folder = tiny.variant(checkpoint.folder, tmp_path / "damaged", drop=["*.safetensors"])
    tensors = tiny.tensors_of(checkpoint.theirs)
    tensor = tensors.pop(name)
    for harmed in (tensors, tensors | {name: tensor[:0].clone()}, tensors | {name: tensor, name + "s": tensor.clone()}):
        tiny.save_tensors(harmed, folder)
        with pytest.raises(MinivlmError, match=name):
            load(folder)


def test_without_vision_its_weights_are_never_read(checkpoint, vlm, tmp_path):
    """They may be missing from the disk; in memory there is nothing of them."""
    folder = tiny.variant(checkpoint.folder, tmp_path / "blind", drop=["*.safetensors"])
    tensors = tiny.tensors_of(checkpoint.theirs)
    tiny.save_tensors({name: t for name, t in tensors.items() if name.startswith("language_model")}, folder)
    blind = tiny.minivlm.load(folder, device="cpu", dtype="float32", vision=False)
    unread = {name.split(".")[0] for name, p in blind.model.named_parameters() if p.is_meta}
    assert unread == {"vision_model", "multi_modal_projector"}
    assert torch.equal(our_logits(blind, blind.preprocess(TALKS[1:2])), our_logits(vlm, vlm.preprocess(TALKS[1:2])))
    assert blind.chat("Hello?", max_new_tokens=4) == vlm.chat("Hello?", max_new_tokens=4)
    with pytest.raises(MinivlmError, match="vision=False"):
        blind.preprocess(TALKS[:1])


@pytest.fixture(scope="module")
def text_only(checkpoint, tmp_path_factory):
    """What MllamaForCausalLM saves: a config without parts, names without a prefix."""
    folder = tmp_path_factory.mktemp("mllama") / "text"
    theirs = transformers.MllamaForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    theirs.save_pretrained(folder)
    checkpoint.processor.tokenizer.save_pretrained(folder)
    return folder, theirs


def test_a_text_model_alone_loads(vlm, text_only):
    folder, theirs = text_only
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mllama_text_model"
    ours = load(folder)
    prompt = [Prompt("<|begin_of_text|>Hello there")]
    logits = our_logits(ours, ours.preprocess(prompt))
    with torch.inference_mode():
        assert close(logits, theirs(ours.preprocess(prompt).input_ids).logits[0])
    assert torch.equal(logits, our_logits(vlm, vlm.preprocess(prompt)))
    for asked in (TALKS[0], Prompt("<|image|>", images=[picture(40, 40)])):
        with pytest.raises(MinivlmError, match="text model alone|base model"):
            ours.preprocess([asked])


def test_transformers_reads_the_text_model_that_we_save(text_only, tmp_path):
    folder, theirs = text_only
    load(folder).save(tmp_path / "saved")
    again = transformers.MllamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [{}, {"vocab_size": 99}, {"cross_attention_layers": [0]}], ids=str)
@pytest.mark.parametrize("vision", [{}, {"image_size": 560}], ids=str)
def test_what_a_config_leaves_out_is_what_transformers_takes(text, vision):
    sparse = {"text_config": text, "vision_config": vision}
    theirs = transformers.AutoConfig.for_model("mllama", **json.loads(json.dumps(sparse)))
    assert MllamaConfig.from_hf(sparse) == MllamaConfig.from_hf(json.loads(json.dumps(theirs.to_dict())))


WRONG = {
    "intermediate_layers_indices": {"intermediate_layers_indices": [4]},
    "supported_aspect_ratios": {"supported_aspect_ratios": [[3, 2]]},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_config_that_cannot_be_is_refused(field):
    with pytest.raises(MinivlmError, match=field):
        MllamaConfig.from_hf(CONFIG | {"vision_config": CONFIG["vision_config"] | WRONG[field]})
