"""Rotary embedding: every backend against the definition, and against what a rotation must do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import DTYPES, SEEDS, TOLERANCE, backends, grads, kernels, library, on, randn

from minivlm import ops
from minivlm.errors import MinivlmError
from minivlm.ops.rope import apply_rope_reference

# K, sections: text, odd halves, M-RoPE, the vision tower's two axes, a section of nothing.
TEXT = [(2, None), (14, None), (64, None), (128, None)]
FORMS = st.sampled_from([*TEXT, (128, [16, 24, 24]), (80, [20, 20]), (6, [0, 3])])
SIZES = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 5), st.integers(0, 3))  # B, T, H, G
THETAS = st.sampled_from([1e4, 1e6])


def frequencies(K, theta=1e4):
    return 1 / theta ** (torch.arange(0, K, 2) / K)


def cases(B, T, H, G, K, sections, largest, dtype, seed):
    """Inputs of one call; all rows of positions unlike."""
    shape = (B, T) if sections is None else (len(sections), B, T)
    positions = (torch.rand(shape, generator=torch.Generator().manual_seed(seed), device="cpu") * largest).long()
    q, k = randn(B, T, H, K, dtype=dtype, seed=seed), randn(B, T, G, K, dtype=dtype, seed=seed + 1)
    return q, k, positions.to(q.device)


def close(ours, theirs, largest):
    """The dtype's tolerance, and what a float32 angle can carry: half a unit in its last place."""
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.dtype == exact.dtype and mine.shape == exact.shape
        tolerance, size = TOLERANCE[mine.dtype], float(exact.abs().max()) if exact.numel() else 0.0
        angle = 0.0 if mine.dtype == torch.float64 else 2**-23 * largest * size  # float64 shares the float32 angle
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance * max(1.0, size) + angle)


@kernels
@given(form=FORMS, sizes=SIZES, theta=THETAS, largest=st.sampled_from([1, 4096, 10**6]), dtype=DTYPES, seed=SEEDS)
def test_apply_rope_equals_reference(backend, form, sizes, theta, largest, dtype, seed):
    (K, sections), (B, T, H, G) = form, sizes
    with on(backend):
        q, k, positions = cases(B, T, H, G, K, sections, largest, dtype, seed)
        inv_freq = frequencies(K, theta)
        ours = ops.apply_rope(q, k, positions, inv_freq, sections, 1.25)
        theirs = apply_rope_reference(q, k, positions, inv_freq, sections, 1.25)
    close(ours, theirs, largest)


@kernels
@given(form=FORMS, sizes=SIZES, dtype=DTYPES, seed=SEEDS)
def test_apply_rope_takes_any_strides(backend, form, sizes, dtype, seed):
    """Slices of one projection, heads before tokens, one element into a buffer, channels apart."""
    (K, sections), (B, T, H, G) = form, sizes
    with on(backend):
        q, k, positions = cases(B, T, H, G, K, sections, 100, dtype, seed)
        inv_freq = frequencies(K)
        theirs = apply_rope_reference(q, k, positions, inv_freq, sections)
        together = torch.cat((k, q), 2)
        unaligned = torch.cat((q.new_zeros(1), q.flatten()))[1:].view(q.shape)
        for q2, k2 in (
            (together[:, :, G:], together[:, :, :G]),
            (q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(0, 1).contiguous().transpose(0, 1)),
            (unaligned, torch.stack((k, k), -1)[..., 0]),
        ):
            close(ops.apply_rope(q2, k2, positions, inv_freq, sections), theirs, 100)


@kernels
@given(form=FORMS, sizes=SIZES, dtype=DTYPES, seed=SEEDS)
def test_apply_rope_gradients_equal_reference(backend, form, sizes, dtype, seed):
    (K, sections), (B, T, H, G) = form, sizes
    with on(backend):
        q, k, positions = cases(B, T, H, G, K, sections, 100, dtype, seed)
        inv_freq = frequencies(K)
        ours = grads(lambda q, k: ops.apply_rope(q, k, positions, inv_freq, sections, 1.25), [q, k])
        theirs = grads(lambda q, k: apply_rope_reference(q, k, positions, inv_freq, sections, 1.25), [q, k])
    close(ours, theirs, 100)


@backends
def test_apply_rope_gradcheck(backend):
    with on(backend):
        q, k, positions = cases(2, 3, 3, 1, 8, [1, 2, 1], 50, torch.float64, 0)
        q.requires_grad_(), k.requires_grad_()
        inv_freq = frequencies(8)
        assert torch.autograd.gradcheck(lambda q, k: ops.apply_rope(q, k, positions, inv_freq, [1, 2, 1], 1.5), (q, k))
        (ops.apply_rope(q, k, positions, inv_freq, [1, 2, 1])[0] ** 2).sum().backward()  # k's output is not used
        assert q.grad is not None and (k.grad is None or not k.grad.any())


@backends
@given(seed=SEEDS, position=st.integers(0, 10**6))
def test_apply_rope_keeps_lengths(backend, seed, position):
    with on(backend):
        q, k = randn(1, 1, 2, 64, seed=seed), randn(1, 1, 1, 64, seed=seed + 1)
        turned = ops.apply_rope(q, k, torch.tensor([[position]]), frequencies(64))
        for before, after in zip((q, k), turned, strict=True):
            torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        assert position == 0 or not torch.allclose(turned[0], q, atol=1e-4)


@backends
@given(seed=SEEDS, shift=st.integers(0, 1000))
def test_apply_rope_scores_depend_on_distance_only(backend, seed, shift):
    with on(backend):
        q, k = randn(1, 1, 1, 64, seed=seed).double(), randn(1, 1, 1, 64, seed=seed + 1).double()
        inv_freq = torch.full((32,), 2**-7)  # a power of two: angles are exact

        def score(of_q, of_k):
            turned_q, _ = ops.apply_rope(q, k, torch.tensor([[of_q]]), inv_freq)
            _, turned_k = ops.apply_rope(q, k, torch.tensor([[of_k]]), inv_freq)
            return (turned_q * turned_k).sum()

        torch.testing.assert_close(score(17 + shift, 5 + shift), score(17, 5), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(score(18 + shift, 5 + shift), score(17, 5))


@kernels
def test_apply_rope_angles_are_float32(backend):
    """In bfloat16, position 1001 becomes 1000: an angle off by a radian. The kernel must see the difference."""
    with on(backend):
        q, k = randn(1, 1, 2, 64, dtype=torch.bfloat16), randn(1, 1, 1, 64, dtype=torch.bfloat16)
        positions, inv_freq = torch.tensor([[100_001]]), frequencies(64, 1e6)
        ours = ops.apply_rope(q, k, positions, inv_freq)[0]
        angle = (positions.double() * inv_freq.double())[..., None, :]
        first, second = q.double().chunk(2, -1)
        exact = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
        in_bfloat16 = apply_rope_reference(q, k, positions.bfloat16().long(), inv_freq)[0]
        assert (ours - exact).abs().max() < 0.05 < (in_bfloat16 - exact).abs().max()


@kernels
def test_apply_rope_twice_is_bit_for_bit_the_same(backend):
    with on(backend):
        q, k, positions = cases(2, 9, 5, 2, 80, [20, 20], 10**6, torch.float32, 0)
        runs = [
            grads(lambda q, k: ops.apply_rope(q, k, positions, frequencies(80), [20, 20]), [q, k])
            + list(ops.apply_rope(q, k, positions, frequencies(80), [20, 20]))
            for _ in range(2)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@backends
def test_apply_rope_uses_every_row_of_positions(backend):
    """Fused kernels elsewhere have dropped rows and columns and turned everything by time."""
    with on(backend):
        q, k, positions = cases(1, 2, 2, 1, 128, [16, 24, 24], 50, torch.float32, 0)
        inv_freq = frequencies(128)
        whole = ops.apply_rope(q, k, positions, inv_freq, [16, 24, 24])[0]
        for row, pairs in enumerate([slice(0, 16), slice(16, 40), slice(40, 64)]):
            other = positions.clone()
            other[row] += 3
            changed = (ops.apply_rope(q, k, other, inv_freq, [16, 24, 24])[0] != whole).any(0).any(0).any(0)
            changed = changed[:64] | changed[64:]  # either half of a pair
            assert changed[pairs].all() and changed.sum() == changed[pairs].sum()


@kernels
def test_apply_rope_passes_on_what_is_not_finite(backend):
    with on(backend):
        q, k, positions = cases(1, 3, 2, 1, 16, None, 9, torch.float32, 0)
        q[0, 1, 1, 3], k[0, 0, 0, 15] = float("inf"), float("nan")
        ours = ops.apply_rope(q, k, positions, frequencies(16))
        theirs = apply_rope_reference(q, k, positions, frequencies(16))
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, equal_nan=True)


@backends
def test_apply_rope_refuses_positions_beyond_float32(backend):
    q, inv_freq = torch.ones(1, 2, 1, 4), torch.ones(2)
    for far in (2**24 + 1, -(2**24) - 1):
        with on(backend):
            arguments = [x.to(torch.get_default_device()) for x in (q, q, torch.tensor([[1, far]]), inv_freq)]
            if backend in ("reference", "cpu"):
                with pytest.raises((MinivlmError, IndexError, RuntimeError), match=f"{2**24 + 1}.*{2**24}"):
                    ops.apply_rope(*arguments)
            else:  # a GPU cannot stop to complain
                turned = ops.apply_rope(*arguments)[0]
                assert turned[0, 0].isfinite().all() and turned[0, 1].isnan().all()


@backends
def test_apply_rope_errors_name_both_sizes(backend):
    with on(backend):
        q, k, inv_freq = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8), torch.ones(4)
        positions = torch.ones(2, 3).long()
        for wrong, message in (
            ((q, k[:, :2], positions, inv_freq), r"\(2, 3, 4, 8\).*\(2, 2, 2, 8\)"),
            ((q[0, 0, 0], k, positions, inv_freq), r"\(8,\).*\(2, 3, 2, 8\)"),
            ((q, k, positions, torch.ones(3)), r"\(2, 3, 4, 8\).*\(3,\)"),
            ((q, k, positions[:, :2], inv_freq), r"\(2, 2\).*\(2, 3\)"),
            ((q, k, positions, inv_freq, [1, 3]), r"\(2, 3\).*\(2, 2, 3\)"),
            ((q, k, positions.expand(2, 2, 3), inv_freq, [1, 2]), "3.*4"),
            ((q, k, positions.expand(2, 2, 3), inv_freq, [5, -1]), r"\[5, -1\].*4"),
            ((q, k.to("meta"), positions, inv_freq), f"q is on {q.device}.*k is on meta"),
            ((q, k, positions.to("meta"), inv_freq), "positions is on meta"),
            ((q, k, positions, inv_freq.to("meta")), "inv_freq is on meta"),
            ((q, k, positions, inv_freq.bfloat16()), "bfloat16.*float32"),
            ((q, k, positions.float(), inv_freq), "float32.*int64"),
            ((q, k.double(), positions, inv_freq), "float32.*float64"),
        ):
            with pytest.raises(MinivlmError, match=message):
                ops.apply_rope(*wrong)


@kernels
def test_apply_rope_kernels_check_for_themselves(backend):
    with on(backend):
        op, q, positions = library(backend).apply_rope, torch.ones(1, 2, 1, 4), torch.ones(1, 2).long()
        for wrong in (
            (q, q, positions, torch.ones(3)),
            (q, q, positions[:, :1], torch.ones(2)),
            (q, q, positions, torch.ones(2), [3]),
            (q, q, positions.expand(2, 1, 2), torch.ones(2), [3, -1]),
            (q, q.double(), positions, torch.ones(2)),
            (q, q, positions.int(), torch.ones(2)),
            (torch.ones(1, 2, 1, 2050), torch.ones(1, 2, 1, 2050), positions, torch.ones(1025)),
        ):
            with pytest.raises(RuntimeError, match="apply_rope"):
                op(*wrong)
