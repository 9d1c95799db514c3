"""The decoder against transformers' Llama, Mistral and Qwen2: scalings, windows, biases, heads; cache and padding."""

import json

import pytest
import tiny
import torch
import transformers
from transformers import AutoConfig

from minivlm import decoder
from minivlm.cache import KVCache
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.errors import MinivlmError
from minivlm.positions import text_positions

V = 64
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
SMALL = {"vocab_size": V, "max_position_embeddings": 32, "rope_theta": 300.0, **tiny.TEXT}
LLAMA = SMALL | {"model_type": "llama"}
MISTRAL = SMALL | {"model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = SMALL | {"model_type": "qwen2", "num_key_value_heads": 2}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
TRAINED = {"original_max_position_embeddings": 16}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "linear": {"type": "linear", "factor": 2.5},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"type": "yarn", "factor": 4.0, **TRAINED},
    "longrope": {"type": "longrope", **LONG, **TRAINED},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **BANDS, **TRAINED},
}
CONFIGS = {
    "llama": LLAMA,
    "grouped heads": LLAMA | {"num_key_value_heads": 2},
    "one key head": LLAMA | {"num_key_value_heads": 1},
    "wide heads": LLAMA | {"head_dim": 20, "num_key_value_heads": 2},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "tied": LLAMA | {"tie_word_embeddings": True},
    "another activation and eps": LLAMA | {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    "mistral": MISTRAL,
    "mistral without a window": MISTRAL | {"sliding_window": None},
    "mistral, window of 7": MISTRAL | {"sliding_window": 7},
    "mistral, window of 2": MISTRAL | {"sliding_window": 2},  # of 1, their cache keeps too much
    "qwen2": QWEN2,
    "qwen2, a window it does not use": QWEN2 | {"sliding_window": 7},
    "qwen2, window from layer 1": QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen2, window in all layers": QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "qwen2, window in none": QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    **{kind: LLAMA | {"rope_scaling": scaling} for kind, scaling in SCALINGS.items()},
    **{
        f"{kind}, as version 5 spells it": {key: value for key, value in LLAMA.items() if key != "rope_theta"}
        | {"rope_parameters": {"rope_theta": 300.0, "rope_type": kind, **scaling}}
        for kind, scaling in SCALINGS.items()
    },
}  # fmt: skip
GROWING = ("dynamic", "longrope")  # frequencies change with the length, so the cache holds keys of several


@pytest.fixture(scope="module")
def models():
    """name → (ours, theirs) with the same random parameters, strictly loaded."""
    made = {}

    def get(name):
        if name not in made:
            config = CONFIGS[name]
            theirs = tiny.build(config | {"architectures": [ARCHITECTURES[config["model_type"]]]})
            made[name] = with_weights_of(theirs, DecoderConfig.from_hf(config)), theirs
        return made[name]

    return get


def with_weights_of(theirs, config):
    ours = Decoder(config)
    ours.load_state_dict({name.removeprefix("model."): p for name, p in theirs.named_parameters()})
    return ours.eval().requires_grad_(False)


def prompts():
    """Rows of 24, 17 and 3 tokens, left-padded: ids and mask."""
    ids = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in ((1, 17), (2, 3)):
        mask[row, :-length] = 0
    return ids, mask


def full(ours, ids, mask, **options):
    return ours(ours.embed_tokens(ids), mask, **options)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_transformers(models, name):
    ours, theirs = models(name)
    ids, mask = prompts()
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    assert tiny.close(full(ours, ids, mask)[mask > 0], wanted[mask > 0])
    assert 0.3 < wanted.std() < 10


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_decode_steps_equal_transformers(models, name):
    """24 tokens and then 14 more, one at a time: past windows, trained lengths and the config's longest."""
    ours, theirs = models(name)
    ids, mask = prompts()
    more = torch.randint(V, (3, 14), generator=torch.Generator().manual_seed(2))
    cache = KVCache(ours.config.num_layers)
    positions = text_positions(mask)  # as their generate() has them; left alone, forward() counts the padding, too
    their_cache = theirs(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    full(ours, ids, mask, cache=cache)
    for i in range(more.shape[1]):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        step = more[:, i : i + 1]
        wanted = theirs(
            input_ids=step, attention_mask=mask, position_ids=text_positions(mask)[:, -1:],
            past_key_values=their_cache, use_cache=True,
        ).logits[:, 0]  # fmt: skip
        assert tiny.close(ours.decode(step, cache), wanted), i


TRAPS = {  # change → the config in which it must be felt
    "rope_theta": ("llama", {"rope_theta": 1e4}),
    "linear scaling": ("linear", {"rope_scaling": None}),
    "dynamic scaling": ("dynamic", {"max_position_embeddings": 8}),
    "yarn's attention factor": ("yarn", {"rope_scaling": SCALINGS["yarn"] | {"attention_factor": 1.0}}),
    "longrope's trained length": ("longrope", {"original_max_position_embeddings": 99}),
    "llama3's bands": ("llama3", {"rope_scaling": SCALINGS["llama3"] | {"low_freq_factor": 2.0}}),
    "a window one larger": ("mistral, window of 7", {"sliding_window": 8}),
    "the first windowed layer": ("qwen2, window from layer 1", {"max_window_layers": 2}),
    "a window that is not used": (
        "qwen2, a window it does not use", {"use_sliding_window": True, "max_window_layers": 0},
    ),
    "eps": ("another activation and eps", {"rms_norm_eps": 1e-6}),
    "activation": ("another activation and eps", {"hidden_act": "silu"}),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
@torch.inference_mode()
def test_another_number_in_the_config_breaks_parity(models, trap):
    name, change = TRAPS[trap]
    _, theirs = models(name)
    ids, mask = prompts()
    other = with_weights_of(theirs, DecoderConfig.from_hf(CONFIGS[name] | change))
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    assert not tiny.close(full(other, ids, mask)[mask > 0], wanted[mask > 0], atol=1e-3)


@pytest.mark.parametrize("name", ["biases", "qwen2"])
@torch.inference_mode()
def test_every_bias_is_felt(models, name):
    ours, theirs = models(name)
    ids, mask = prompts()
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    biases = [key for key in ours.state_dict() if key.startswith("layers.1") and key.endswith("bias")]
    assert len(biases) == (7 if name == "biases" else 3)
    for key in biases:
        bias = ours.get_parameter(key)
        kept = bias.clone()
        bias.zero_()
        assert not tiny.close(full(ours, ids, mask), wanted, atol=1e-3), key
        bias.copy_(kept)


@torch.inference_mode()
def test_a_dropped_mask_breaks_parity(models, monkeypatch):
    ours, theirs = models("llama")
    ids, mask = prompts()
    wanted = theirs(input_ids=ids, attention_mask=mask).logits[mask > 0]
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "causal_mask", lambda *_: None)
        assert not tiny.close(full(ours, ids, mask)[mask > 0], wanted, atol=1e-3)
    monkeypatch.setattr(decoder, "attention", lambda q, k, v, *_, attend=decoder.attention, **__: attend(q, k, v))
    assert not tiny.close(full(ours, ids[:1], mask[:1])[0], wanted[:24], atol=1e-3)


# --- metamorphic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith(GROWING)])
@torch.inference_mode()
def test_cached_equals_uncached_and_a_row_is_the_same_alone(models, name):
    ours, _ = models(name)
    ids, mask = prompts()
    cache = KVCache(ours.config.num_layers, capacity=5)
    whole = full(ours, ids, mask)
    cut = 22  # one token of the shortest row
    assert tiny.close(full(ours, ids[:, :cut], mask[:, :cut], cache=cache, last_only=True)[:, 0], whole[:, cut - 1])
    for i in range(cut, ids.shape[1]):
        assert tiny.close(ours.decode(ids[:, i : i + 1], cache), whole[:, i])
    for row in range(3):
        real = mask[row] > 0
        alone = full(ours, ids[row : row + 1, real], mask[row : row + 1, real])
        assert tiny.close(whole[row, real], alone[0], atol=2e-5)


@torch.inference_mode()
def test_more_padding_changes_nothing(models):
    ours, _ = models("mistral, window of 7")
    ids, mask = prompts()
    wider = [torch.nn.functional.pad(x, (6, 0)) for x in (ids, mask)]
    assert tiny.close(full(ours, *wider)[:, 6:][mask > 0], full(ours, ids, mask)[mask > 0], atol=2e-5)


@torch.inference_mode()
def test_what_stands_on_padding_changes_nothing(models):
    ours, _ = models("llama")
    ids, mask = prompts()
    other = ids.where(mask > 0, 63 - ids)
    assert torch.equal(full(ours, other, mask)[mask > 0], full(ours, ids, mask)[mask > 0])


@torch.inference_mode()
def test_a_reordered_cache_goes_on_as_the_rows_it_was_made_of(models):
    ours, _ = models("grouped heads")
    ids, mask = prompts()
    rows = torch.tensor([2, 0, 0, 1])
    cache, apart = KVCache(3), KVCache(3)
    full(ours, ids, mask, cache=cache)
    cache.reorder(rows)
    full(ours, ids[rows], mask[rows], cache=apart)
    step = torch.tensor([[5], [6], [7], [8]])
    for _ in range(2):
        assert tiny.close(ours.decode(step, cache), ours.decode(step, apart), atol=1e-5)


@torch.inference_mode()
def test_a_layer_of_another_class_joins_the_list(models):
    """What Mllama does: anything that is called as layer(x, step)."""
    ours, theirs = models("llama")

    class Twice(torch.nn.Module):
        def forward(self, x, step):
            assert step.positions.shape == x.shape[:2]
            return 2 * x

    mixed = Decoder(ours.config, [ours.layers[0], Twice(), *ours.layers[1:]])
    mixed.embed_tokens, mixed.norm, mixed.lm_head = ours.embed_tokens, ours.norm, ours.lm_head
    ids, mask = prompts()
    hook = theirs.model.layers[0].register_forward_hook(lambda *args: 2 * args[2])
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    hook.remove()
    assert tiny.close(full(mixed, ids, mask)[mask > 0], wanted[mask > 0])


def test_gradients_reach_every_parameter(models):
    _, theirs = models("biases")
    ours = with_weights_of(theirs, DecoderConfig.from_hf(CONFIGS["biases"])).requires_grad_(True)
    ids, mask = prompts()
    full(ours, ids, mask)[mask > 0].logsumexp(-1).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- configs ----------------------------------------------------------------------------------------------------------

SPARSE = {
    "nothing": {},
    "vicuna in llava-1.5": {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
            "num_key_value_heads": 40},
    "a window": {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 21},
    "tied": {"tie_word_embeddings": True},
    "nulls": {"rope_scaling": None, "sliding_window": None},
}  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("sparse", SPARSE)
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type, sparse):
    given = {key: value for key, value in SPARSE[sparse].items() if model_type != "llama" or "window" not in key}
    theirs = AutoConfig.for_model(model_type, **json.loads(json.dumps(given)))
    full_config = json.loads(json.dumps(theirs.to_dict()))
    ours = DecoderConfig.from_hf(given | {"model_type": model_type})
    assert ours == DecoderConfig.from_hf(full_config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (None if model_type == "llama" else theirs.sliding_window)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_parameters_are_those_of_transformers_by_name_and_shape(model_type):
    with torch.device("meta"):
        ours = Decoder(DecoderConfig.from_hf({"model_type": model_type}))
        theirs = getattr(transformers, ARCHITECTURES[model_type])(AutoConfig.for_model(model_type))
    wanted = {name.removeprefix("model."): p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == wanted


def test_an_unknown_text_model_is_refused_by_name():
    with pytest.raises(MinivlmError, match="'gpt2'.*llama, mistral, qwen2"):
        DecoderConfig.from_hf({"model_type": "gpt2"})
