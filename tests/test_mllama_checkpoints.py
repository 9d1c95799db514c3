"""Mllama's tiles and prompts, and its checkpoints: every layout, text alone, what is refused."""

import itertools
import json

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from mllama_tiny import CONFIG, RATIOS, TALKS, opened
from tiny import close, load, our_logits, picture, turn
from transformers.models.mllama import image_processing_pil_mllama as their_tiles
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from minivlm import Prompt
from minivlm.errors import MinivlmError
from minivlm.hub import ALIASES
from minivlm.models.mllama import MllamaConfig, choose_canvas, fitted_size, sights


@pytest.fixture(scope="module")
def checkpoint():
    return opened()[0]


@pytest.fixture(scope="module")
def vlm():
    return opened()[1]


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


def test_a_head_with_a_row_for_the_image_token_loads_without_it(checkpoint, vlm, tmp_path):
    folder = tiny.variant(checkpoint.folder, tmp_path / "expanded", drop=["*.safetensors"])
    tensors, head = tiny.tensors_of(checkpoint.theirs), "language_model.lm_head.weight"
    longer = torch.cat([tensors[head], torch.full((1, 48), 9.0)])
    tiny.save_tensors(tensors | {head: longer}, folder)
    other = load(folder)
    assert torch.equal(our_logits(other, other.preprocess(TALKS)), our_logits(vlm, vlm.preprocess(TALKS)))
    for name, harmed in (head, torch.ones(500, 47)), ("language_model.model.embed_tokens.weight", torch.ones(500, 48)):
        tiny.save_tensors(tensors | {name: harmed}, folder)
        with pytest.raises(MinivlmError, match=name):
            load(folder)


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


PARAMS = {  # Meta's params.json → the alias of the same weights
    "llama-3.2-11b-vision": {"vision_chunk_size": 448, "vision_num_cross_attention_layers": 8},
    "llama-3.2-11b-vision-instruct": {"vision_chunk_size": 560, "vision_num_cross_attention_layers": 8},
    "llama-3.2-90b-vision": {"vision_chunk_size": 448, "vision_num_cross_attention_layers": 20},
    "llama-3.2-90b-vision-instruct": {"vision_chunk_size": 560, "vision_num_cross_attention_layers": 20},
}


@pytest.mark.parametrize("alias", PARAMS)
def test_metas_own_shards_are_refused_with_their_twin(tmp_path, alias):
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    tiny.write_json(tmp_path / "params.json", PARAMS[alias])
    with pytest.raises(MinivlmError, match=rf"\.pth .*{ALIASES[alias]} \({alias}\)$"):
        load(tmp_path)


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
