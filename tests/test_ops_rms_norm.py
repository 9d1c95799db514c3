"""RMSNorm and its fused residual addition: every backend against the definition, in every dtype, over odd shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import DTYPES, LAYOUTS, SEEDS, WIDTHS, backends, close, grads, kernels, laid_out, library, on, randn

from minivlm import ops
from minivlm.errors import MinivlmError
from minivlm.ops.rms_norm import add_rms_norm_reference, rms_norm_reference

EPS = 1e-6
ROWS = st.integers(0, 5)
SIZES = st.sampled_from([1e-3, 1.0, 1e4])  # 1e4 squared overflows float16


@kernels
@given(width=WIDTHS, rows=ROWS, dtype=DTYPES, layout=LAYOUTS, size=SIZES, seed=SEEDS)
def test_rms_norm_equals_reference(backend, width, rows, dtype, layout, size, seed):
    with on(backend):
        x, weight = randn(rows, width, dtype=dtype, seed=seed) * size, randn(width, dtype=dtype, seed=seed + 1)
        ours = ops.rms_norm(laid_out(x, layout), laid_out(weight, layout), EPS)
        theirs = rms_norm_reference(x, weight, EPS)
    assert ours.isfinite().all()
    close(ours, theirs)


@kernels
@given(width=WIDTHS, rows=ROWS, dtype=DTYPES, layout=LAYOUTS, seed=SEEDS)
def test_add_rms_norm_equals_reference(backend, width, rows, dtype, layout, seed):
    with on(backend):
        residual, x = (randn(rows, width, dtype=dtype, seed=seed + i) for i in range(2))
        weight = randn(width, dtype=dtype, seed=seed + 2)
        ours, ours_total = ops.add_rms_norm(laid_out(residual, layout), laid_out(x, layout), weight, EPS)
        theirs, theirs_total = add_rms_norm_reference(residual, x, weight, EPS)
    assert torch.equal(ours_total, theirs_total)  # one addition, one rounding
    close(ours, theirs)


@kernels
@given(width=WIDTHS, rows=st.integers(1, 40), dtype=DTYPES, seed=SEEDS)
def test_add_rms_norm_gradients_equal_reference(backend, width, rows, dtype, seed):
    """40 rows are several chunks of the weight's gradient; both outputs carry gradient, as in a decoder layer."""
    with on(backend):
        inputs = [randn(rows, width, dtype=dtype, seed=seed + i) + 1 for i in range(2)]
        inputs.append(randn(width, dtype=dtype, seed=seed + 2))
        ours = grads(lambda r, x, w: ops.add_rms_norm(r, x, w, EPS), inputs)
        theirs = grads(lambda r, x, w: add_rms_norm_reference(r, x, w, EPS), [t.double() for t in inputs])
    for mine, exact in zip(ours, theirs, strict=True):
        close(mine, exact.to(dtype), factor=2 * exact.abs().max())


@backends
def test_rms_norm_gradcheck(backend):
    with on(backend):
        x, weight = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 7), (7,)))
        assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, EPS), (x, weight))
        assert torch.autograd.gradcheck(lambda r, x, w: ops.add_rms_norm(r, x, w, EPS), (x, x.detach() + 1, weight))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_rms_norm_passes_on_what_is_not_finite(backend, value, dtype):
    with on(backend):
        x, weight = randn(2, 65, dtype=dtype), randn(65, dtype=dtype)
        x[0, 3] = value
        ours, theirs = ops.rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    assert torch.equal(ours[0].isnan(), theirs[0].isnan()) and torch.equal(ours[0].nan_to_num(), theirs[0].nan_to_num())
    assert ours[0, 3].isnan() and ours[1].isfinite().all()


@backends
def test_rms_norm_does_not_care_about_scale(backend):
    with on(backend):
        x, weight = randn(3, 64), randn(64)
        close(ops.rms_norm(x * 1000, weight, 0.0), ops.rms_norm(x, weight, 0.0))
        assert not torch.allclose(ops.rms_norm(x / 1000, weight, 1e-5), ops.rms_norm(x, weight, 1e-5), atol=0.1)


@kernels
def test_rms_norm_rounds_before_the_multiply(backend):
    """bfloat16(x / rms) * weight, as Llama has it; one rounding at the end gives other numbers."""
    with on(backend):
        x, weight = randn(64, 512, dtype=torch.bfloat16), randn(512, dtype=torch.bfloat16)
        ours = ops.rms_norm(x, weight, EPS)
        rounded_once = rms_norm_reference(x.float(), weight.float(), EPS).bfloat16()
        assert (ours != rounded_once).float().mean() > 0.1
        assert (ours != rms_norm_reference(x, weight, EPS)).float().mean() < 0.01


@kernels
def test_rms_norm_twice_is_bit_for_bit_the_same(backend):
    with on(backend):
        inputs = [randn(100, 769), randn(769)]
        first, second = (grads(lambda x, w: ops.rms_norm(x, w, EPS), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@backends
def test_rms_norm_brings_unlike_dtypes_to_the_wider(backend):
    """Autocast leaves float32 weights beside bfloat16 activations."""
    with on(backend):
        x, weight = randn(2, 8, dtype=torch.bfloat16), randn(8)
        assert torch.equal(ops.rms_norm(x, weight, EPS), ops.rms_norm(x.float(), weight, EPS))
        normed, total = ops.add_rms_norm(x.float(), x, weight.bfloat16(), EPS)
    assert normed.dtype == total.dtype == torch.float32


@backends
def test_rms_norm_errors_name_both_sizes(backend):
    with on(backend):
        with pytest.raises(MinivlmError, match=r"\(2, 8\).*\(7,\)"):
            ops.rms_norm(torch.ones(2, 8), torch.ones(7), EPS)
        with pytest.raises(MinivlmError, match=r"\(2, 8\).*\(3, 8\)"):
            ops.add_rms_norm(torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), EPS)
        x, weight, nowhere = torch.ones(2, 8), torch.ones(8), torch.ones(2, 8, device="meta")
        with pytest.raises(MinivlmError, match=f"x is on {x.device}, weight is on meta"):
            ops.rms_norm(x, nowhere[0], EPS)
        for wrong in ((nowhere, x, weight), (x, nowhere, weight), (x, x, nowhere[0])):
            with pytest.raises(MinivlmError, match=f"is on {x.device}.*is on meta|is on meta.*is on {x.device}"):
                ops.add_rms_norm(*wrong, EPS)


@kernels
def test_rms_norm_kernels_check_for_themselves(backend):
    """Compiled graphs and other callers reach the op without passing the Python function."""
    with on(backend):
        op = library(backend).rms_norm
        with pytest.raises(RuntimeError, match=r"\[2, 8\].*\[7\]"):
            op(torch.ones(2, 8), torch.ones(7), EPS)
        with pytest.raises(RuntimeError, match="Float.*Double"):
            op(torch.ones(2, 8), torch.ones(8).double(), EPS)
        with pytest.raises(RuntimeError, match="Int"):
            op(torch.ones(2, 8).int(), torch.ones(8).int(), EPS)
