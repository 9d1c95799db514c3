"""Frequencies equal transformers' for every kind of scaling and both spellings; positions count real tokens."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minivlm.errors import MinivlmError
from minivlm.positions import Rope, RopeConfig, mrope_positions, rope_frequencies, text_positions

K = 16  # head width, so 8 pairs
BASE = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128, "rope_theta": 500.0}
LONG = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.7 * i for i in range(8)]}
TRAINED = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 2.5},
    "linear, under both names": {"type": "default", "rope_type": "linear", "factor": 2.5},
    "dynamic": {"type": "dynamic", "factor": 3.0},
    "yarn": {"type": "yarn", "factor": 4.0, **TRAINED},
    "yarn, its length unsaid": {"rope_type": "yarn", "factor": 4.0},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, **TRAINED},
    "yarn, one mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, **TRAINED},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, **TRAINED},
    "yarn, betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 5.0, "beta_slow": 2.0, **TRAINED},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, **TRAINED},
    "yarn, no stretch": {"rope_type": "yarn", "factor": 1.0, **TRAINED},
    "longrope": {"type": "longrope", **LONG, **TRAINED},
    "longrope, factor": {"rope_type": "longrope", "factor": 2.0, **LONG, **TRAINED},
    "longrope, attention factor": {"rope_type": "longrope", "attention_factor": 1.2, **LONG, **TRAINED},
    "llama3": {**LLAMA3, **TRAINED},
    "llama3, its length unsaid": LLAMA3,
}
LENGTHS = (1, 32, 33, 128, 129, 300)  # around the trained length, 32, and the largest of the config, 128


def spelled(scaling, spelling):
    """The config.json with `rope_scaling`, as on the hub, or with `rope_parameters`, as transformers 5 writes it."""
    if spelling == "old":
        return BASE | {"rope_scaling": scaling}
    scaling = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    rest = {key: value for key, value in BASE.items() if key != "rope_theta"}
    return rest | {"rope_parameters": {"rope_theta": 500.0, **scaling}}


def ours_of(config):
    return RopeConfig.from_hf({"rope_theta": 10000.0} | config, K)


def their_frequencies(config, length):
    rotary = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq, rotary.attention_scaling


def equal(ours, theirs):
    return torch.allclose(ours[0], theirs[0], rtol=2e-6, atol=0) and abs(ours[1] - theirs[1]) < 1e-6


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name, spelling):
    config = spelled(SCALINGS[name], spelling)
    for length in LENGTHS:
        assert equal(rope_frequencies(ours_of(config), length), their_frequencies(config, length)), length


@pytest.mark.parametrize("name", [name for name in SCALINGS if name not in ("default", "yarn, no stretch")])
def test_every_scaling_is_felt(name):
    """The twin: none of the kinds above is the same as no scaling at all."""
    ours = rope_frequencies(ours_of(spelled(SCALINGS[name], "old")), 300)
    assert not equal(ours, rope_frequencies(ours_of(BASE), 300))


VARIANTS = ("yarn, mscale", "yarn, attention factor", "yarn, betas", "yarn, not truncated", "longrope, factor")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_of_a_scaling_is_felt(name):
    ours, plain = (rope_frequencies(ours_of(spelled(SCALINGS[n], "old")), 300) for n in (name, name.split(",")[0]))
    assert not equal(ours, plain)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_the_trained_length_beside_the_scaling_counts(kind):
    config = BASE | {"rope_scaling": SCALINGS[kind], "original_max_position_embeddings": 100}
    assert equal(rope_frequencies(ours_of(config), 50), their_frequencies(config, 50))
    assert not equal(rope_frequencies(ours_of(config), 50), their_frequencies(spelled(SCALINGS[kind], "old"), 50))


def test_old_names_mean_the_same():
    assert ours_of(spelled({"type": "su", **LONG}, "old")) == ours_of(spelled({"type": "longrope", **LONG}, "old"))
    section = {"mrope_section": [2, 3, 3]}
    old, new = ({"type": "mrope", **section}, {"type": "default", "rope_type": "default", **section})
    assert ours_of(spelled(old, "old")) == ours_of(spelled(new, "old"))
    assert ours_of(spelled(old, "old")).sections == (2, 3, 3)
    assert hash(ours_of(spelled(old, "old"))) == hash(ours_of(spelled(new, "old")))


@pytest.mark.parametrize("scaling, said", [
    ({"type": "ntk-by-parts", "factor": 2.0}, "ntk-by-parts"),
    ({"type": "linear"}, "factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor, high_freq_factor"),
    ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "long_factor"),
    ({"type": "mrope", "mrope_section": [2, 3, 4]}, "mrope_section"),
], ids=str)  # fmt: skip
def test_a_scaling_that_cannot_be_is_refused_by_name(scaling, said):
    with pytest.raises(MinivlmError, match=said):
        ours_of(spelled(scaling, "old"))


def test_rope_answers_for_the_length_in_use_and_forgets_none_that_it_needs():
    """Dynamic scaling up and down again, as two conversations in a row have it."""
    config = ours_of(spelled(SCALINGS["dynamic"], "old"))
    rope = Rope(config)
    for length in (10, 300, 301, 10):
        assert torch.equal(rope.at(length, torch.device("cpu"))[0], rope_frequencies(config, length)[0])
        assert len(rope.known) == 1  # a long answer does not fill the memory with one table a token
    plain = Rope(ours_of(BASE))
    assert plain.at(10, torch.device("cpu"))[0] is plain.at(11, torch.device("cpu"))[0]


def test_text_positions_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert text_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


@given(st.integers(0, 9), st.integers(1, 9))
def test_left_padding_moves_no_position(padding, length):
    mask = torch.tensor([[0] * padding + [1] * length])
    assert text_positions(mask)[0, padding:].tolist() == list(range(length))


# --- M-RoPE -----------------------------------------------------------------------------------------------------------

IMAGE, VIDEO, WORD, PAD = 90, 91, 5, 0
grids = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))  # of tokens: frame pairs, rows, columns
pieces = st.one_of(st.integers(1, 4), st.tuples(st.just(IMAGE), grids), st.tuples(st.just(VIDEO), grids))


def slow_row(parts):
    """The paper's rule, a token at a time: (ids, [(frame, row, column)]). A part is a number of words or a block."""
    ids, positions = [], []
    for part in parts:
        if isinstance(part, int):
            for _ in range(part):
                following = max((max(p) for p in positions), default=-1) + 1
                ids.append(WORD)
                positions.append((following, following, following))
            continue
        token_id, (frames, rows, columns) = part
        following = max((max(p) for p in positions), default=-1) + 1
        for frame in range(frames):
            for row in range(rows):
                for column in range(columns):
                    ids.append(token_id)
                    positions.append((following + frame, following + row, following + column))
    return ids, positions


@given(st.lists(st.lists(pieces, min_size=1, max_size=6), min_size=1, max_size=3), st.integers(1, 3))
def test_mrope_positions_of_any_interleaving(batch, merge):
    """Blocks may stand side by side without a word between them."""
    rows = [slow_row(parts) for parts in batch]
    T = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([[PAD] * (T - len(ids)) + ids for ids, _ in rows])
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids, _ in rows])
    blocks = [part for parts in batch for part in parts if not isinstance(part, int)]
    in_patches = {
        token_id: torch.tensor([(t, h * merge, w * merge) for own, (t, h, w) in blocks if own == token_id])
        for token_id in (IMAGE, VIDEO)
    }
    before = input_ids.clone(), mask.clone()
    ours = mrope_positions(input_ids, mask, in_patches, merge)
    assert torch.equal(input_ids, before[0]) and torch.equal(mask, before[1])
    for row, (ids, positions) in enumerate(rows):
        assert ours[:, row, T - len(ids) :].T.tolist() == [list(p) for p in positions]
        assert not ours[:, row, : T - len(ids)].any()


def test_mrope_positions_by_hand():
    """word, a block of 1 × 2 × 2, word, a film of 3 × 1 × 2 (its frames are its longest side), word."""
    input_ids = torch.tensor([[PAD, WORD, *[IMAGE] * 4, WORD, *[VIDEO] * 6, WORD]])
    grids = {IMAGE: torch.tensor([[1, 4, 4]]), VIDEO: torch.tensor([[3, 2, 4]])}
    ours = mrope_positions(input_ids, (input_ids != PAD).long(), grids, merge=2)
    assert ours[:, 0].tolist() == [
        [0, 0, 1, 1, 1, 1, 3, 4, 4, 5, 5, 6, 6, 7],
        [0, 0, 1, 1, 2, 2, 3, 4, 4, 4, 4, 4, 4, 7],
        [0, 0, 1, 2, 1, 2, 3, 4, 5, 4, 5, 4, 5, 7],
    ]


def test_mrope_positions_of_words_are_text_positions():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ours = mrope_positions(torch.full((2, 5), WORD), mask, {IMAGE: None, VIDEO: None}, merge=2)
    assert torch.equal(ours, text_positions(mask).expand(3, 2, 5))
