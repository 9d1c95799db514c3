"""The arithmetic of choosing a token, against transformers' logits processors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs_all

from minivlm.errors import MinivlmError
from minivlm.sampling import Sampling, draw, keep_likely, penalise, prompt_words

PROBABILITY = st.floats(0.01, 1.0)


def ours_probabilities(scores, sampling):
    """(B, V) probabilities: the weights that are left, back at their words' places."""
    weights, words = keep_likely(scores, sampling)
    if words is not None:
        weights = torch.zeros_like(scores).scatter(1, words, weights)
    return weights / weights.sum(-1, keepdim=True)


def theirs_probabilities(scores, sampling):
    chain = theirs_all.LogitsProcessorList([theirs_all.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k > 0:
        chain.append(theirs_all.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(theirs_all.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chain.append(theirs_all.MinPLogitsWarper(sampling.min_p))
    return chain(None, scores).softmax(-1)


@given(
    st.integers(1, 80), st.integers(0, 2**32), st.floats(0.05, 5.0), st.integers(0, 100), PROBABILITY,
    st.just(0.0) | st.floats(0.0, 0.9),
)  # fmt: skip
def test_keep_likely_leaves_the_distribution_of_transformers(V, seed, temperature, top_k, top_p, min_p):
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(seed)) * 4
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours, theirs = ours_probabilities(scores, sampling), theirs_probabilities(scores, sampling)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", [{"temperature": 0.8}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_every_filter_is_seen_by_the_comparison(changed):
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2
    sampling = {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    theirs = theirs_probabilities(scores, Sampling(**sampling))
    torch.testing.assert_close(ours_probabilities(scores, Sampling(**sampling)), theirs, atol=1e-6, rtol=0)
    assert not torch.allclose(ours_probabilities(scores, Sampling(**sampling | changed)), theirs, atol=1e-3)


def test_filters_are_applied_to_what_temperature_left():
    """0.6, 0.3, 0.1 at temperature 0.5 are 0.783, 0.196, 0.022: top_p=0.7 keeps one word there, but two at 1."""
    scores = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert (ours_probabilities(scores, Sampling(temperature=0.5, top_p=0.7)) > 0).tolist() == [[True, False, False]]
    assert (ours_probabilities(scores, Sampling(temperature=1.0, top_p=0.7)) > 0).tolist() == [[True, True, False]]


def test_top_k_is_exact_where_words_tie():
    ours = ours_probabilities(torch.zeros(2, 7), Sampling(temperature=1.0, top_k=3))
    assert (ours > 0).sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_are_finite(temperature):
    scores = torch.tensor([[3.0, -2.0, 3.0, 1.0]])
    ours = ours_probabilities(scores, Sampling(temperature=temperature, top_p=0.999))
    expected = [[0.5, 0, 0.5, 0]] if temperature < 1 else [[0.25] * 4]
    torch.testing.assert_close(ours, torch.tensor(expected))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32), st.floats(0.1, 3.0))
def test_penalise_equals_transformers(V, T, seed, penalty):
    """Placeholders count, padding does not, ids that the head cannot say (up to V + 3 here) are harmless."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, V, generator=generator) * 3
    ids = torch.randint(0, V + 4, (2, T), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : T // 2] = 0
    ours = penalise(scores, prompt_words(ids, mask, V, 2), penalty)
    processor = theirs_all.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=mask.argmax(1))
    torch.testing.assert_close(ours, processor(ids, scores), atol=1e-6, rtol=1e-6)


def test_penalise_notices_padding_and_signs():
    scores, ids = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[2, 0, 1]])
    ours = penalise(scores, prompt_words(ids, torch.tensor([[0, 1, 1]]), 3, 1), 2.0)
    assert ours.tolist() == [[1.0, -4.0, 1.0]]
    assert penalise(scores, prompt_words(ids, torch.ones(1, 3), 3, 1), 2.0).tolist() == [[1.0, -4.0, 0.5]]


@given(st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 3.0]), min_size=1, max_size=9).filter(any), st.booleans())
def test_draw_gives_every_word_its_share(weights, shuffled):
    """Numbers on an even grid must fall on each word in proportion to its weight, and on a filtered word never."""
    C, N = len(weights), 1000
    words = torch.arange(C).flip(0) if shuffled else torch.arange(C)
    numbers = (torch.arange(N, dtype=torch.float64)[:, None] + 0.5) / N
    drawn = draw(torch.tensor(weights).expand(N, C), words.expand(N, C) if shuffled else None, numbers)
    counts = torch.bincount(drawn, minlength=C)[words]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert (counts - N * shares).abs().max() <= 1
    assert counts[torch.tensor(weights) == 0].sum() == 0


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_draw_stays_inside_at_the_ends(number):
    weights = torch.tensor([[0.0, 0.3, 0.7, 0.0]])
    assert draw(weights, None, torch.tensor([[number]], dtype=torch.float64)).item() in (1, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"top_k": -1}, {"min_p": -0.1}, {"min_p": 1.5},
        {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf}, {"num_beams": 0}, {"seed": -1},
        {"seed": 2**63}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": [3]},
        {"max_new_tokens": 2.5}, {"top_k": None}, {"temperature": "0.5"}, {"top_p": None}, {"seed": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_named_in_one_line(arguments):
    with pytest.raises(MinivlmError) as error:
        Sampling(**arguments)
    assert str(error.value).startswith(next(iter(arguments))) and "\n" not in str(error.value)


def test_beams_do_not_sample():
    with pytest.raises(MinivlmError, match="num_beams=1 or temperature=0"):
        Sampling(num_beams=2, temperature=0.5)


@pytest.mark.parametrize("stop, expected", [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b"))])
def test_stop_is_one_string_or_several(stop, expected):
    assert Sampling(stop=stop).stop == expected
