"""How answers end and what of their text is shown, on models that follow a script."""

import math

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minivlm.cache import KVCache
from minivlm.errors import MinivlmError
from minivlm.generate import Answer, Beams, find_stop, generate, stream
from minivlm.inputs import Inputs
from minivlm.sampling import Sampling
from minivlm.text import Tokenizer


def prompt(B=1):
    return Inputs(torch.ones(B, 2, dtype=torch.int64), torch.ones(B, 2, dtype=torch.int64))


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


def said(rows, tokenizer, eos=(), **sampling):
    model = Script(rows, len(tokenizer.words))
    sampling = {"max_new_tokens": max(len(row) for row in rows)} | sampling
    return generate(model, prompt(len(rows)), Sampling(**sampling), tokenizer, eos, 0), model


def test_rows_end_apart_and_the_loop_with_the_last():
    tokenizer = Words("", "a", "b", "c", "<end>")
    answers, model = said([[1, 4, 1, 1, 1], [1, 2, 3, 4, 1], [4, 3, 3, 3, 3]], tokenizer, eos=(4,), max_new_tokens=9)
    assert [a.token_ids for a in answers] == [[1, 4], [1, 2, 3, 4], [4]]
    assert [a.text for a in answers] == ["a", "abc", ""]
    assert [a.finish_reason for a in answers] == ["stop"] * 3
    assert model.fed == [[1, 1, 0], [0, 2, 0], [0, 3, 0]]  # pad where a row has ended


def test_reasons_to_finish():
    tokenizer = Words("", "a", "b", "<end>")
    answers, _ = said([[1, 1, 1], [1, 1, 3], [1, 2, 1]], tokenizer, eos=(3,), stop="ab")
    assert [a.finish_reason for a in answers] == ["length", "stop", "stop"]  # the last may be a stop token, too
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


def test_stop_string_that_is_complete_first_cuts():
    assert find_stop("aabc", ("abc", "b")) == 2  # "b" is complete before "abc", which began earlier
    assert find_stop("aabc", ("c", "abc")) == 1  # complete at once: the longer one
    assert find_stop("aab", ("abc", "c")) is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), STOPS)
def test_all_that_is_certain_is_shown_and_nothing_else(tokens, stop):
    """After each token: all of the text but the longest tail that some continuation could turn into a stop string."""
    answer = Answer(Words(*PIECES), Sampling(max_new_tokens=99, stop=stop), frozenset())
    for n, token in enumerate(tokens):
        answer.push(token)
        text = "".join(PIECES[i] for i in tokens[: n + 1])
        end = first_end(text, stop)
        assert (answer.finish_reason == "stop") == (end is not None)
        if end is not None:
            assert answer.text == text[: end[1]]
            break
        open_tails = [at for at in range(len(text)) if any(s.startswith(text[at:]) for s in stop)]
        assert answer.text == text[: min(open_tails, default=len(text))]


def test_only_the_k_best_candidates_may_end():
    """Token 9 ends: as the second of two beams' candidates it counts, as the third it is passed over."""

    def ends(token_ids):
        return token_ids[-1] == 9

    beams = Beams(2)
    beams.advance([(-1.0, 0, 3), (-2.0, 0, 4), (-3.0, 0, 9), (-4.0, 0, 5)], ends)
    assert beams.ended == []
    beams.advance([(-2.0, 1, 5), (-3.0, 0, 9), (-4.0, 0, 6), (-5.0, 1, 9)], ends)
    assert beams.ended == [(-1.5, [3, 9])]
    assert [(beam.total, beam.parent, beam.token_ids) for beam in beams.alive] == [(-2.0, 1, [4, 5]), (-4.0, 0, [3, 6])]
    assert beams.open


def test_beams_that_go_on_are_found_behind_many_that_end():
    """Of the second step's five best, [1, 3] [2, 8] [1, 8] [1, 9] [1, 4], three end: the second beam to go on is the
    fifth, and becomes the answer."""
    likely = {0: {1: 0.6, 2: 0.4}, 1: {3: 0.34, 8: 0.23, 9: 0.225, 4: 0.205}, 2: {8: 0.5, 9: 0.3, 5: 0.2}, 4: {8: 1.0}}

    class Table(Script):
        def decode(self, ids, cache):  # noqa: ARG002
            logits = torch.full((len(ids), 10), -20.0)
            for row, last in enumerate(ids[:, 0].tolist()):
                for token, chance in likely.get(last, dict.fromkeys(range(8), 0.125)).items():
                    logits[row, token] = math.log(chance)
            return logits

        def forward(self, inputs, cache, last_only):
            super().forward(inputs, cache, last_only)
            return self.decode(torch.zeros(1, 1).long(), cache)[:, None]

    sampling = Sampling(max_new_tokens=3, num_beams=2)
    (only,) = generate(Table([[]], 10), prompt(1), sampling, Words(*"0123456789"), (8, 9), 0)
    assert only.token_ids == [1, 4, 8]


def test_beams_stop_at_strings():
    (only,), _ = said([[1, 5, 7, 1]], Words(*PIECES), stop="bb>", num_beams=2)
    assert (only.token_ids, only.text, only.finish_reason) == ([1, 5, 7], "aa", "stop")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}, {"num_beams": 2}], ids=str)
def test_broken_logits_are_an_error_in_one_line(value, sampling):
    model = Script([[1]], 5, peak=value)
    with pytest.raises(MinivlmError, match="^the model's logits are not finite.*float32$"):
        generate(model, prompt(), Sampling(**sampling), Words(*PIECES), (), 0)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_rows_that_have_ended_may_break(sampling):
    """What a row says behind its end concerns nobody; some models answer padding with NaN."""

    class Broken(Script):
        def _say(self, i, cache):
            logits = super()._say(i, cache)
            logits[0] *= torch.nan if i > 0 else 1
            return logits

    sampling = Sampling(max_new_tokens=3, **sampling)
    answers = generate(Broken([[4], [1, 2, 1]], 5), prompt(2), sampling, Words(*PIECES), (4,), 0)
    assert [a.token_ids for a in answers] == [[4], [1, 2, 1]]


def byte_tokenizer():
    """GPT-2's alphabet without merges: one token per byte of UTF-8, and a special token at the end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


def test_stream_never_gives_half_a_character():
    tokenizer = byte_tokenizer()
    text = "Ein Käse: 🧀, ein 語"
    ids = [*tokenizer.encode(text), tokenizer.token_to_id("<end>")]
    model = Script([ids], 257)
    streamed = stream(model, prompt(), Sampling(max_new_tokens=99), tokenizer, (ids[-1],), 0)
    pieces = [(piece, len(model.fed) + 1) for piece in streamed]
    assert [piece for piece, _ in pieces] == list(text)
    ends = [len(text[: n + 1].encode()) for n in range(len(text))]
    assert [num_tokens for _, num_tokens in pieces] == ends  # each as soon as it is complete
    assert (streamed.result.text, streamed.result.token_ids) == (text, ids)


def test_answer_cut_inside_a_character_says_so():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a🧀")[:-1]
    assert list(stream(Script([ids], 257), prompt(), Sampling(max_new_tokens=4), tokenizer, (), 0)) == ["a", "\ufffd"]


def test_words_that_the_tokenizer_does_not_know_are_no_text():
    """Padded vocabularies: the head may say more words than the tokenizer has."""
    tokenizer = byte_tokenizer()
    ids = [260, *tokenizer.encode("a"), 299]
    (only,) = generate(Script([ids], 300), prompt(), Sampling(max_new_tokens=3), tokenizer, (), 0)
    assert (only.text, only.token_ids) == ("a", ids)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_placeholders_beyond_the_head_are_harmless(num_beams):
    """Mllama's head lacks the image token, which the penalty meets in the prompt; the pad may lie there, too."""
    inputs = Inputs(torch.tensor([[5, 1], [1, 1]]), torch.ones(2, 2, dtype=torch.int64))
    sampling = Sampling(max_new_tokens=3, repetition_penalty=1.2, num_beams=num_beams)
    answers = generate(Script([[1, 2, 1], [4, 1, 1]], 5), inputs, sampling, Words(*PIECES), (4,), 6)
    assert [a.token_ids for a in answers] == [[1, 2, 1], [4]]


def test_inference_mode_is_the_model_s_and_not_the_caller_s():
    model = Script([[1, 2, 1]], 11)
    outside = [
        torch.is_inference_mode_enabled()
        for _ in stream(model, prompt(), Sampling(max_new_tokens=3), Words(*PIECES), (), 0)
    ]
    assert (model.inference, outside) == ([True] * 3, [False] * 3)
