"""The loop: parity with transformers on a tiny Llama, and the rules of ending on models that follow a script."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minivlm.cache import KVCache
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.errors import MinivlmError
from minivlm.generate import Stream, Timing, generate
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


# --- models that follow a script --------------------------------------------------------------------------------------


class Script(nn.Module):
    """Says rows of given tokens, and then 0, whatever it is asked: its logits are `peak` there and 0 elsewhere."""

    def __init__(self, rows, vocabulary, peak=50.0):
        super().__init__()
        self.rows, self.vocabulary, self.peak, self.fed = rows, vocabulary, peak, []
        self.inference = []

    def new_cache(self, capacity):
        return KVCache(0, capacity)

    def forward(self, inputs, cache, last_only):
        assert last_only
        cache.position_delta = torch.arange(len(inputs.input_ids))  # which row a beam is of
        return self._say(0, cache)[:, None]

    def decode(self, ids, cache):
        self.fed.append(ids[:, 0].tolist())
        return self._say(len(self.fed), cache)

    def _say(self, i, cache):
        self.inference.append(torch.is_inference_mode_enabled())
        logits = torch.zeros(len(cache.position_delta), self.vocabulary)
        for row, origin in enumerate(cache.position_delta.tolist()):
            logits[row, self.rows[origin][i] if i < len(self.rows[origin]) else 0] = self.peak
        return logits


class Words:
    """A stand-in for text.Tokenizer: token i is the string words[i]; the last one is special."""

    def __init__(self, *words):
        self.words = words

    def decode(self, ids, skip_special=True):
        words = self.words[:-1] if skip_special else self.words
        return "".join(words[i] for i in ids if i < len(words))

    def token_to_id(self, text):
        return self.words.index(text) if text in self.words else None

    def stream(self):
        words = self

        class Pieces:
            push = staticmethod(lambda token: words.decode([token]))
            end = staticmethod(lambda: "")

        return Pieces


def said(rows, tokenizer, vocabulary=None, eos=(), pad=0, **sampling):
    inputs = Inputs(torch.ones(len(rows), 2, dtype=torch.int64), torch.ones(len(rows), 2, dtype=torch.int64))
    model = Script(rows, vocabulary or len(tokenizer.words))
    sampling = {"max_new_tokens": max(len(row) for row in rows)} | sampling
    return generate(model, inputs, Sampling(**sampling), tokenizer, eos, pad), model


def test_rows_end_apart_and_the_loop_with_the_last():
    tokenizer = Words("", "a", "b", "c", "<end>")
    answers, model = said([[1, 4, 1, 1, 1], [1, 2, 3, 4, 1], [4, 3, 3, 3, 3]], tokenizer, eos=(4,), max_new_tokens=9)
    assert token_ids(answers) == [[1, 4], [1, 2, 3, 4], [4]]
    assert [a.text for a in answers] == ["a", "abc", ""]
    assert [a.finish_reason for a in answers] == ["stop"] * 3
    assert model.fed == [[1, 1, 0], [0, 2, 0], [0, 3, 0]]  # pad where a row has ended


def test_reasons_to_finish():
    tokenizer = Words("", "a", "b", "<end>")
    answers, _ = said([[1, 1, 1], [1, 1, 3], [1, 2, 1]], tokenizer, eos=(3,), stop="ab")
    assert [a.finish_reason for a in answers] == [
        "length",
        "stop",
        "stop",
    ]  # the last token allowed may be the stop token
    assert [a.text for a in answers] == ["aaa", "aa", ""]


def test_stop_token_is_no_text_even_if_it_is_not_special():
    (only,), _ = said([[1, 2]], Words("", "a", "b", "<end>"), eos=(2,))
    assert (only.token_ids, only.text) == ([1, 2], "a")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_string_may_name_a_special_token(num_beams):
    (only,), _ = said([[1, 3, 1]], Words("", "a", "b", "<end>"), stop="<end>", num_beams=num_beams)
    assert (only.token_ids, only.text, only.finish_reason) == ([1, 3], "a", "stop")


def first_end(text, stop):
    """(how much of `text` has been read, where the answer is cut) when it ends in a stop string for the first time."""
    for n in range(1, len(text) + 1):
        starts = [n - len(s) for s in stop if text[:n].endswith(s)]
        if starts:
            return n, min(starts)
    return None


PIECES = ("", "a", "b", "<", ">", "ab", "<a", "b>", "aab<", ">a<b", "<end>")  # the last is special
STOPS = st.lists(st.text("ab<>", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), STOPS)
def test_stop_strings_across_tokens(tokens, stop):
    """The text is cut where reading it letter by letter would, and the loop ends with the token that completes it."""
    (ours,), _ = said([tokens], Words(*PIECES), stop=stop)
    text = "".join(PIECES[i] for i in tokens)
    end = first_end(text, stop)
    if end is None:
        assert (ours.text, ours.token_ids, ours.finish_reason) == (text, tokens, "length")
        return
    read, cut = end
    needed = next(n for n in range(1, len(tokens) + 1) if sum(len(PIECES[i]) for i in tokens[:n]) >= read)
    assert (ours.text, ours.token_ids, ours.finish_reason) == (text[:cut], tokens[:needed], "stop")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), STOPS)
def test_stream_shows_all_that_is_certain_and_nothing_else(tokens, stop):
    """After each token: all of the text but the longest tail that some continuation could turn into a stop string."""
    inputs = Inputs(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    model = Script([tokens], len(PIECES))
    stream = Stream(model, inputs, Sampling(max_new_tokens=len(tokens), stop=stop), Words(*PIECES), (), 0)
    shown = ""
    for piece in stream:
        assert piece
        shown += piece
        if stream.result is None and len(model.fed) + 1 < len(tokens):
            text = "".join(PIECES[i] for i in tokens[: len(model.fed) + 1])
            end = first_end(text, stop)
            open_tails = [n for n in range(len(text)) if any(s.startswith(text[n:]) for s in stop)]
            assert shown == text[: end[1] if end else min(open_tails, default=len(text))]
    (whole,), _ = said([tokens], Words(*PIECES), stop=stop)
    assert shown == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids


def test_beams_stop_at_strings():
    (only,), _ = said([[1, 5, 7, 1]], Words(*PIECES), stop="bb>", num_beams=2)
    assert (only.token_ids, only.text, only.finish_reason) == ([1, 5, 7], "aa", "stop")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}, {"num_beams": 2}], ids=str)
def test_broken_logits_are_an_error_in_one_line(value, sampling):
    model = Script([[1]], 5, peak=value)
    inputs = Inputs(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(MinivlmError, match="^the model's logits are not finite.*float32$"):
        generate(model, inputs, Sampling(**sampling), Words(*PIECES), (), 0)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_rows_that_have_ended_may_break(sampling):
    """What a row says behind its end concerns nobody; some models answer padding with NaN."""

    class Broken(Script):
        def _say(self, i, cache):
            logits = super()._say(i, cache)
            logits[0] *= torch.nan if i > 0 else 1
            return logits

    inputs = Inputs(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64))
    sampling = Sampling(max_new_tokens=3, **sampling)
    assert token_ids(generate(Broken([[4], [1, 2, 1]], 5), inputs, sampling, Words(*PIECES), (4,), 0)) == [
        [4],
        [1, 2, 1],
    ]


# --- text -------------------------------------------------------------------------------------------------------------


def byte_tokenizer():
    """GPT-2's alphabet without merges: one token per byte of UTF-8, and a special token at the end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


def test_stream_never_gives_half_a_character():
    tokenizer, inputs = byte_tokenizer(), row_alone(prompts(0), 0)
    text = "Ein Käse: 🧀, ein 語"
    ids = [*tokenizer.encode(text), tokenizer.token_to_id("<end>")]
    stream = Stream(Script([ids], 257), inputs, Sampling(max_new_tokens=99), tokenizer, (ids[-1],), 0)
    pieces = list(stream)
    assert pieces == list(text)
    assert (stream.result.text, stream.result.token_ids) == (text, ids)


def test_answer_cut_inside_a_character_says_so():
    tokenizer, inputs = byte_tokenizer(), row_alone(prompts(0), 0)
    ids = tokenizer.encode("a🧀")[:-1]
    assert list(Stream(Script([ids], 257), inputs, Sampling(max_new_tokens=4), tokenizer, (), 0)) == ["a", "\ufffd"]


def test_words_that_the_tokenizer_does_not_know_are_no_text():
    """Padded vocabularies: the head may say more words than the tokenizer has."""
    tokenizer, inputs = byte_tokenizer(), row_alone(prompts(0), 0)
    ids = [260, *tokenizer.encode("a"), 299]
    (only,) = generate(Script([ids], 300), inputs, Sampling(max_new_tokens=3), tokenizer, (), 0)
    assert (only.text, only.token_ids) == ("a", ids)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_placeholders_beyond_the_head_are_harmless(num_beams):
    """Mllama's head lacks the image token, which the penalty meets in the prompt; the pad may lie there, too."""
    inputs = Inputs(torch.tensor([[5, 1], [1, 1]]), torch.ones(2, 2, dtype=torch.int64))
    sampling = Sampling(max_new_tokens=3, repetition_penalty=1.2, num_beams=num_beams)
    answers = generate(Script([[1, 2, 1], [4, 1, 1]], 5), inputs, sampling, Words(*PIECES), (4,), 6)
    assert token_ids(answers) == [[1, 2, 1], [4]]


# --- stream and clock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, SAMPLED, {"num_beams": 3}], ids=str)
def test_stream_equals_generate(sampling):
    model, inputs = TinyModel(tiny_llama(0)), row_alone(prompts(0), 0)
    (whole,) = answer(model, inputs, **{"max_new_tokens": 8} | sampling)
    stream = Stream(model, inputs, Sampling(**{"max_new_tokens": 8} | sampling), word_tokenizer(), EOS, PAD)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.result.text
    assert (len(pieces) == 1) == (stream.result.score is not None)
    assert stream.result.token_ids == whole.token_ids


def test_stream_takes_one_conversation():
    with pytest.raises(MinivlmError, match="not 3: use generate"):
        Stream(TinyModel(tiny_llama(0)), prompts(0), Sampling(), word_tokenizer(), EOS, PAD)


def test_inference_mode_is_the_model_s_and_not_the_caller_s():
    model, inputs = Script([[1, 2, 1]], 11), Inputs(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1))
    outside = [
        torch.is_inference_mode_enabled()
        for _ in Stream(model, inputs, Sampling(max_new_tokens=3), Words(*PIECES), (), 0)
    ]
    assert (model.inference, outside) == ([True] * 3, [False] * 3)


def test_timing_counts_what_was_said():
    answers = answer(TinyModel(tiny_llama(0)), prompts(0), eos=(), max_new_tokens=5)
    timing = answers[0].timing
    assert 0 < timing.first_token < timing.total
    assert (timing.new_tokens, timing.rows) == (15, 3)
    assert all(a.timing is timing for a in answers)
    assert Timing(first_token=1.0, total=3.0, new_tokens=15, rows=3).tokens_per_second == 6.0
    assert Timing(first_token=1.0, total=1.0, new_tokens=3, rows=3).tokens_per_second == 0.0
