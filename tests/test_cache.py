"""The cache holds what was written, however it grows; the mask says who may look at whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlm.cache import KVCache, causal_mask

B, G, K = 2, 3, 4


def keys(T, seed, rows=B):
    return torch.randn(rows, G, T, K, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20))
def test_what_was_appended_comes_back_in_order(steps, capacity):
    cache, so_far = KVCache(2, capacity), [[], []]
    for i, T in enumerate(steps):
        for layer in (0, 1):
            k = keys(T, 2 * i + layer)
            so_far[layer].append(k)
            ours_k, ours_v = cache.append(layer, k, -k)
            assert torch.equal(ours_k, torch.cat(so_far[layer], 2))
            assert torch.equal(ours_v, -ours_k)
        cache.advance(T)
    assert cache.length == sum(steps)


def test_nothing_is_allocated_while_there_is_room():
    cache = KVCache(1, capacity=10)
    cache.append(0, keys(4, 0), keys(4, 0))
    cache.advance(4)
    buffer = cache.keys[0].data_ptr()
    for i in range(6):
        assert cache.append(0, keys(1, i), keys(1, i))[0].data_ptr() == buffer
        cache.advance(1)
    assert cache.keys[0].shape[2] == 10


def test_capacity_doubles():
    cache, shapes = KVCache(1), []
    for i in range(20):
        cache.append(0, keys(1, i), keys(1, i))
        cache.advance(1)
        shapes.append(cache.keys[0].shape[2])
    assert shapes == [1, 2, 4, 4] + [8] * 4 + [16] * 8 + [32] * 4


def test_reorder_copies_rows_with_all_that_is_theirs():
    """Beams are born: two rows become five, and each goes on alone."""
    cache, k = KVCache(2, 8), keys(3, 0)
    cache.append(1, k, -k)  # layer 0 keeps nothing, as a cross-attention layer does
    cache.advance(3)
    cache.padding = torch.tensor([[True, False, False], [False, False, False]])
    cache.position_delta = torch.tensor([-1, 0])
    cache.memory["states"] = torch.tensor([[10.0], [20.0]])
    rows = torch.tensor([1, 0, 0, 1, 1])
    cache.reorder(rows)
    more = keys(1, 1, rows=5)
    ours_k, ours_v = cache.append(1, more, -more)
    assert torch.equal(ours_k, torch.cat([k[rows], more], 2)) and torch.equal(ours_v, -ours_k)
    assert cache.position_delta.tolist() == [0, -1, -1, 0, 0]
    assert cache.memory["states"].tolist() == [[20], [10], [10], [20], [20]]
    assert cache.key_mask(4)[:, 0].tolist() == [True, False, False, True, True]
    assert cache.keys[0] is None


def test_the_key_mask_hides_padding_and_nothing_after_it():
    cache = KVCache(1)
    assert cache.key_mask(5) is None
    cache.padding = torch.tensor([[True, True, False], [False, False, False]])
    assert cache.key_mask(5).tolist() == [[False, False, True, True, True], [True] * 5]


@given(
    st.integers(1, 7), st.integers(0, 6), st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.none() | st.integers(1, 9),
)  # fmt: skip
def test_the_mask_is_the_rule_cell_by_cell(T, before, padding, window):
    """T new slots behind `before` old ones; `padding[b]` slots of row b are empty, on the left."""
    S = before + T
    key_mask = torch.arange(S)[None] >= torch.tensor(padding)[:, None] if any(padding) else None
    mask = causal_mask(T, S, key_mask, window, torch.device("cpu"))
    if mask is None:  # said by `is_causal`, or by nothing at all where one query sees everything
        assert key_mask is None and T in (1, S) and (window is None or window >= S)
        return
    mask = mask.expand(len(padding), 1, T, S)
    for b, empty in enumerate(padding):
        for i in range(T):
            query = before + i
            for slot in range(S):
                sees = slot <= query and (window is None or query - slot < window) and (slot >= empty)
                assert mask[b, 0, i, slot] == (sees or slot == query)


@pytest.mark.parametrize("window", [None, 2])
def test_no_row_of_a_mask_is_empty(window):
    """softmax over no key is 0/0; padding looks at itself."""
    key_mask = torch.tensor([[False, False, False, True]])
    assert causal_mask(4, 4, key_mask, window, torch.device("cpu")).any(-1).all()
