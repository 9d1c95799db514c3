"""patch_merge: every backend against LayerNorm and a permutation, over several pictures of unlike sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import DTYPES, LAYOUTS, SEEDS, backends, close, grads, kernels, laid_out, library, on, randn

from minivlm import ops
from minivlm.errors import MinivlmError
from minivlm.ops.patch_merge import patch_merge_reference

EPS = 1e-6
WIDTHS = st.sampled_from([1, 5, 8, 80, 769, 1280])
CELLS = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))  # frames, and cells down and across
PICTURES = st.lists(CELLS, max_size=3)


def arguments(cells, merge, C, dtype, seed):
    grids = torch.tensor([[t, h * merge, w * merge] for t, h, w in cells], device="cpu").view(-1, 3).long()
    x = randn(int(grids.prod(-1).sum()), C, dtype=dtype, seed=seed)
    return x, grids, randn(C, dtype=dtype, seed=seed + 1), randn(C, dtype=dtype, seed=seed + 2)


@kernels
@given(cells=PICTURES, merge=st.integers(1, 3), C=WIDTHS, dtype=DTYPES, layout=LAYOUTS, seed=SEEDS)
def test_patch_merge_equals_reference(backend, cells, merge, C, dtype, layout, seed):
    with on(backend):
        x, grids, weight, bias = arguments(cells, merge, C, dtype, seed)
        elsewhere = laid_out(x, layout)
        ours = ops.patch_merge(elsewhere, grids, merge, weight, bias, EPS)
        theirs = patch_merge_reference(x, grids, merge, weight, bias, EPS)
        close(ours, theirs)
        assert torch.equal(ours, ops.patch_merge(elsewhere, grids.to(x.device), merge, weight, bias, EPS))


@kernels
@given(cells=PICTURES, merge=st.integers(1, 3), C=st.sampled_from([5, 8, 80, 769]), dtype=DTYPES, seed=SEEDS)
def test_patch_merge_gradients_equal_reference(backend, cells, merge, C, dtype, seed):
    with on(backend):
        x, grids, weight, bias = arguments(cells, merge, C, dtype, seed)
        ours = grads(lambda x, w, b: ops.patch_merge(x, grids, merge, w, b, EPS), [x, weight, bias])
        exact = [t.double() for t in (x, weight, bias)]
        theirs = grads(lambda x, w, b: patch_merge_reference(x, grids, merge, w, b, EPS), exact)
    for mine, exact in zip(ours, theirs, strict=True):
        close(mine, exact.to(dtype), factor=2 * exact.abs().max() if exact.numel() else 1)


@backends
def test_patch_merge_gradcheck(backend):
    with on(backend):
        x, grids, weight, bias = arguments([(1, 2, 1), (2, 1, 1)], 2, 7, torch.float64, 0)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(lambda x, w, b: ops.patch_merge(x, grids, 2, w, b, EPS), leaves)


@backends
def test_patch_merge_order_by_hand(backend):
    """Two frames of 2 x 4 patches, then a picture of 2 x 2; one patch at a time is not flat, and is looked for."""
    numbers = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15], [16, 17, 18, 19]]
    with on(backend):
        for number in range(20):
            x = torch.zeros(20, 2)
            x[number] = torch.tensor([1.0, -1.0])
            merged = ops.patch_merge(x, torch.tensor([[2, 2, 4], [1, 2, 2]]), 2, torch.ones(2), torch.zeros(2), EPS)
            cell = next(i for i, cell in enumerate(numbers) if number in cell)
            slot = numbers[cell].index(number)
            assert merged.nonzero().tolist() == [[cell, 2 * slot], [cell, 2 * slot + 1]]


@backends
@given(cells=PICTURES, merge=st.integers(1, 3), seed=SEEDS)
def test_patch_merge_is_a_permutation_of_layer_norm(backend, cells, merge, seed):
    with on(backend):
        x, grids, weight, bias = arguments(cells, merge, 16, torch.float32, seed)
        merged = ops.patch_merge(x, grids, merge, weight, bias, EPS).reshape(-1, 16)
        normed = torch.nn.functional.layer_norm(x, (16,), weight, bias, EPS)
        close(merged.sort(0).values, normed.sort(0).values)
        if merge == 1:
            close(merged, normed)


@backends
@given(seed=SEEDS)
def test_patch_merge_together_is_apart(backend, seed):
    with on(backend):
        x, grids, weight, bias = arguments([(1, 2, 3), (2, 1, 2)], 2, 16, torch.float32, seed)
        together = ops.patch_merge(x, grids, 2, weight, bias, EPS)
        apart = [ops.patch_merge(x[:24], grids[:1], 2, weight, bias, EPS)]
        apart += [ops.patch_merge(x[24:], grids[1:], 2, weight, bias, EPS)]
        assert torch.equal(together, torch.cat(apart))


@kernels
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_patch_merge_keeps_what_is_not_finite_in_its_patch(backend, value):
    with on(backend):
        x, grids, weight, bias = arguments([(1, 2, 2)], 2, 40, torch.float32, 0)
        x[5, 3] = value
        ours = ops.patch_merge(x, grids, 2, weight, bias, EPS)
        theirs = patch_merge_reference(x, grids, 2, weight, bias, EPS)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan().sum() == 40


@kernels
def test_patch_merge_twice_is_bit_for_bit_the_same(backend):
    with on(backend):
        x, grids, weight, bias = arguments([(1, 5, 5), (1, 4, 3)], 2, 161, torch.float32, 0)
        leaves = [x, weight, bias]
        first, second = (grads(lambda x, w, b: ops.patch_merge(x, grids, 2, w, b, EPS), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@backends
def test_patch_merge_brings_unlike_dtypes_to_the_wider(backend):
    with on(backend):
        x, grids, weight, bias = arguments([(1, 2, 1)], 2, 16, torch.bfloat16, 0)
        ours = ops.patch_merge(x, grids, 2, weight.float(), bias, EPS)
        assert torch.equal(ours, ops.patch_merge(x.float(), grids, 2, weight.float(), bias.float(), EPS))


WRONG = [
    ({"grids": [[1, 2, 4]]}, "8.*12"),
    ({"grids": [[1, 3, 4]]}, "2 x 2"),
    ({"grids": [[-1, -3, 4]]}, "2 x 2"),
    ({"grids": [[1, 12]]}, r"\(1, 2\).*\(pictures, 3\)"),
    ({"weight": 7}, r"\(12, 8\).*\(7,\)"),
    ({"bias": 9}, r"\(12, 8\).*\(9,\)"),
    ({"merge": 0}, "0 x 0"),
    ({"device": "meta"}, "x is on meta, weight is on"),
]


@backends
@pytest.mark.parametrize(("change", "message"), WRONG)
def test_patch_merge_errors_name_both_sizes(backend, change, message):
    with on(backend), pytest.raises(MinivlmError, match=message):
        grids = torch.tensor(change.get("grids", [[1, 2, 6]]))
        weight, bias = torch.ones(change.get("weight", 8)), torch.ones(change.get("bias", 8))
        x = torch.ones(12, 8, device=change.get("device"))
        ops.patch_merge(x, grids, change.get("merge", 2), weight, bias, EPS)


HOSTILE = [[[1, 2, 4]], [[1, 3, 4]], [[-1, -2, 6]], [[0, 2, 6]], [[2**62, 2, 2]], [[2**31, 2**31, 4]], [[1, 2, 6]] * 2]


@kernels
@pytest.mark.parametrize("grids", HOSTILE)
def test_patch_merge_kernels_check_for_themselves(backend, grids):
    with on(backend), pytest.raises(RuntimeError, match="patch_merge"):
        library(backend).patch_merge(torch.ones(12, 8), torch.tensor(grids), 2, torch.ones(8), torch.ones(8), EPS)
