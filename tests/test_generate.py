"""The loop on a tiny Llama: parity with transformers, batches, seeds. Endings are in test_generate_text.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tokenizers
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minivlm.cache import KVCache
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.errors import MinivlmError
from minivlm.generate import Timing, generate, stream
from minivlm.inputs import Inputs
from minivlm.sampling import Sampling
from minivlm.text import Tokenizer

V, EOS, PAD = 40, (7, 21), 39


# --- a model from both houses -----------------------------------------------------------------------------------------


class TinyModel(nn.Module):
    """A text-only model with the interface of models/*.py; it remembers how it was called."""

    def __init__(self, theirs):
        super().__init__()
        self.decoder = Decoder(DecoderConfig.from_hf(theirs.config.to_dict()))
        self.decoder.load_state_dict({name.removeprefix("model."): p for name, p in theirs.state_dict().items()})
        self.prompts, self.fed = [], []

    def new_cache(self, capacity):
        return KVCache(self.decoder.config.num_layers, capacity)

    def forward(self, inputs, cache, last_only):
        self.prompts.append(inputs.input_ids.tolist())
        x = self.decoder.embed_tokens(inputs.input_ids)
        return self.decoder(x, inputs.attention_mask, cache=cache, last_only=last_only)

    def decode(self, ids, cache):
        self.fed.append(ids[:, 0].tolist())
        return self.decoder.decode(ids, cache)


def tiny_llama(seed):
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # norms' weights around 1: all parameters count
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (1 if p.dim() == 1 else 0))
    return theirs


def prompts(seed):
    """Three rows of 9, 6 and 2 tokens, left-padded."""
    ids = torch.randint(1, V - 1, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 3), (2, 7)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return Inputs(ids, mask)


def row_alone(inputs, row):
    real = inputs.attention_mask[row] > 0
    return Inputs(inputs.input_ids[row : row + 1, real], inputs.attention_mask[row : row + 1, real])


def word_tokenizer(size=V):
    words = {f"w{i}": i for i in range(size)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")))


def answer(model, inputs, eos=EOS, tokenizer=None, **sampling):
    return generate(model, inputs, Sampling(**sampling), tokenizer or word_tokenizer(), eos, PAD)


def their_answer(theirs, inputs, eos=EOS, **sampling):
    """Token ids per row, without the padding behind them, and the beams' scores."""
    sampling = {"num_beams": 1, "do_sample": False, "eos_token_id": list(eos) or None, "pad_token_id": PAD} | sampling
    out = theirs.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, return_dict_in_generate=True,
        output_scores=True, **sampling,
    )  # fmt: skip
    rows = out.sequences[:, inputs.input_ids.shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos), len(row)) for row in rows]
    ids = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return ids, out.sequences_scores.tolist() if sampling["num_beams"] > 1 else [None] * len(ids)


def token_ids(answers):
    return [a.token_ids for a in answers]


SEARCHES = [
    {"max_new_tokens": 16},
    {"max_new_tokens": 16, "repetition_penalty": 1.3},
    {"max_new_tokens": 16, "num_beams": 3},
    {"max_new_tokens": 16, "num_beams": 3, "repetition_penalty": 1.3},
    {"max_new_tokens": 1, "num_beams": 4},
    {"max_new_tokens": 5, "num_beams": 2},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("eos", [(), (7,), tuple(range(1, 15))], ids=["no eos", "one eos", "many eos"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_scores_equal_transformers(search, eos, seed):
    """Left-padded rows that end at different times; with many eos ids nearly all end early."""
    theirs, inputs = tiny_llama(seed), prompts(seed)
    ours = answer(TinyModel(theirs), inputs, eos, **search)
    ids, scores = their_answer(theirs, inputs, eos, **search)
    assert token_ids(ours) == ids
    assert [a.score for a in ours] == pytest.approx(scores, abs=1e-4)
    assert [a.finish_reason for a in ours] == ["stop" if row[-1] in eos else "length" for row in ids]


@pytest.mark.parametrize(
    "changed",
    [{"repetition_penalty": 1.0}, {"num_beams": 1}, {"num_beams": 2}, {"eos": (7,)}, {"eos": tuple(range(1, 14))}],
    ids=str,
)
def test_parity_notices_what_is_changed(changed):
    search = {"num_beams": 3, "repetition_penalty": 1.3, "max_new_tokens": 16, "eos": tuple(range(1, 15))}
    differs = [
        token_ids(answer(TinyModel(theirs := tiny_llama(seed)), prompts(seed), **search | changed))
        != their_answer(theirs, prompts(seed), **search)[0]
        for seed in range(3)
    ]
    assert any(differs)


def test_parity_notices_padding_that_is_seen():
    theirs, inputs = tiny_llama(0), prompts(0)
    seen = Inputs(inputs.input_ids, torch.ones_like(inputs.attention_mask))
    ours = token_ids(answer(TinyModel(theirs), seen, max_new_tokens=16))
    ids, _ = their_answer(theirs, inputs, max_new_tokens=16)
    assert ours[0] == ids[0] and ours[1:] != ids[1:]


# --- batches, seeds and the work per token ----------------------------------------------------------------------------


SAMPLED = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3}


@pytest.mark.parametrize(
    "sampling",
    [*SEARCHES, SAMPLED, SAMPLED | {"top_p": 0.8}, SAMPLED | {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}],
    ids=str,
)
def test_batch_equals_single(sampling):
    model, inputs = TinyModel(tiny_llama(1)), prompts(1)
    together = token_ids(answer(model, inputs, **sampling))
    assert together == [token_ids(answer(model, row_alone(inputs, row), **sampling))[0] for row in range(3)]


def test_seed_decides_and_touches_nothing_else():
    model, inputs = TinyModel(tiny_llama(2)), prompts(2)
    state = torch.get_rng_state()
    first, again = (token_ids(answer(model, inputs, **SAMPLED)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first != token_ids(answer(model, inputs, **SAMPLED | {"seed": 4}))
    assert first != token_ids(answer(model, inputs, max_new_tokens=12))  # greedy


def test_seed_gives_a_longer_answer_the_same_beginning():
    model, inputs = TinyModel(tiny_llama(2)), prompts(2)
    short, long = (
        token_ids(answer(model, inputs, eos=(), **SAMPLED | {"max_new_tokens": n}))  # fmt: skip
        for n in (5, 40)
    )
    assert short == [row[:5] for row in long]


def test_rows_differ_without_a_seed():
    inputs = row_alone(prompts(0), 0)
    same = Inputs(inputs.input_ids.repeat(4, 1), inputs.attention_mask.repeat(4, 1))
    model = TinyModel(tiny_llama(0))
    unseeded = token_ids(answer(model, same, eos=(), max_new_tokens=20, temperature=2.0))
    assert len({tuple(row) for row in unseeded}) == 4
    seeded = token_ids(answer(model, same, eos=(), max_new_tokens=20, temperature=2.0, seed=0))
    assert len({tuple(row) for row in seeded}) == 1


def test_sampled_words_have_the_model_s_probabilities():
    """4,000 rows of one prompt against the model's softmax: chi-squared with V − 1 = 39 degrees of freedom."""
    inputs, model = row_alone(prompts(0), 0), TinyModel(tiny_llama(0))
    B = 4000
    same = Inputs(inputs.input_ids.repeat(B, 1), inputs.attention_mask.repeat(B, 1))
    torch.manual_seed(0)
    drawn = torch.tensor(token_ids(answer(model, same, max_new_tokens=1, temperature=3.0)))[:, 0]
    expected = B * (model(inputs, None, True)[0, 0] / 3.0).softmax(-1)
    counts = torch.bincount(drawn, minlength=V)
    assert ((counts - expected) ** 2 / expected).sum() < 90  # p = 1e-5
    flat = torch.full((V,), B / V)
    assert ((counts - flat) ** 2 / flat).sum() > 900


def test_prompt_is_computed_once_and_no_token_in_vain():
    model, inputs = TinyModel(tiny_llama(0)), prompts(0)
    answer(model, inputs, eos=(), num_beams=4, max_new_tokens=6)
    assert model.prompts == [inputs.input_ids.tolist()]  # B rows, not B·k: the vision tower never runs per beam
    assert [len(ids) for ids in model.fed] == [12] * 5  # the first token comes from the prompt, the last is not fed


@pytest.mark.parametrize("sampling", [{}, {"num_beams": 3}], ids=str)
def test_a_limit_far_away_takes_no_memory_and_a_full_cache_grows(sampling, monkeypatch):
    model, inputs, rooms = TinyModel(tiny_llama(2)), prompts(2), []
    new_cache = model.new_cache
    model.new_cache = lambda capacity: rooms.append(capacity) or new_cache(capacity)
    expected = token_ids(answer(model, inputs, eos=(), max_new_tokens=12, **sampling))
    monkeypatch.setattr("minivlm.generate.ROOM", 2)
    assert token_ids(answer(model, inputs, eos=(), max_new_tokens=12, **sampling)) == expected
    assert rooms == [9 + 12, 9 + 2]


def test_a_model_that_has_answered_can_be_trained():
    """What a model keeps from its first answer (rotary frequencies) must not be inference tensors."""
    model, inputs = TinyModel(tiny_llama(0)), prompts(0)
    answer(model, inputs, max_new_tokens=2)
    model(inputs, None, last_only=False).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- stream and clock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, SAMPLED, {"num_beams": 3}], ids=str)
def test_stream_equals_generate(sampling):
    model, inputs = TinyModel(tiny_llama(0)), row_alone(prompts(0), 0)
    (whole,) = answer(model, inputs, **{"max_new_tokens": 8} | sampling)
    streamed = stream(model, inputs, Sampling(**{"max_new_tokens": 8} | sampling), word_tokenizer(), EOS, PAD)
    pieces = list(streamed)
    assert "".join(pieces) == whole.text == streamed.result.text
    assert (len(pieces) == 1) == (streamed.result.score is not None)
    assert streamed.result.token_ids == whole.token_ids


def test_stream_takes_one_conversation():
    with pytest.raises(MinivlmError, match="not 3: use generate"):
        stream(TinyModel(tiny_llama(0)), prompts(0), Sampling(), word_tokenizer(), EOS, PAD)


def test_timing_counts_what_was_said():
    answers = answer(TinyModel(tiny_llama(0)), prompts(0), eos=(), max_new_tokens=5)
    timing = answers[0].timing
    assert 0 < timing.first_token < timing.total
    assert (timing.new_tokens, timing.rows) == (15, 3)
    assert all(a.timing is timing for a in answers)
    assert Timing(first_token=1.0, total=3.0, new_tokens=15, rows=3).tokens_per_second == 6.0
    assert Timing(first_token=1.0, total=1.0, new_tokens=3, rows=3).tokens_per_second == 0.0
