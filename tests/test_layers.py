"""The blocks against transformers' and against their formulas; a packed weight gives the numbers of the plain one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from minivlm import layers
from minivlm.errors import MinivlmError
from minivlm.layers import ACTIVATIONS, GatedMLP, Linear, Projector, RMSNorm, TiedHead, activation, attention, can_pack


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(module, dtype=torch.float32):
    for i, p in enumerate(module.parameters()):
        p.data = noise(*p.shape, seed=i) * (0.5 if p.dim() > 1 else 1.0)
    return module.to(dtype).requires_grad_(False)


# --- packing ----------------------------------------------------------------------------------------------------------

needs_bf16 = pytest.mark.skipif(not can_pack(noise(1, 1, dtype=torch.bfloat16)), reason="needs oneDNN on a CPU")


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (1,), (2, 401)], ids=str)
@pytest.mark.parametrize("sizes", [(64, 96), (24, 7), (33, 65)], ids=str)
def test_a_packed_linear_gives_the_numbers_of_the_plain_one(bias, shape, sizes):
    """To one bf16 rounding, in decoding (one row) as in prefill (many, or so many that they are taken in pieces)."""
    ours, x = filled(Linear(*sizes, bias), torch.bfloat16), noise(*shape, sizes[0], seed=9, dtype=torch.bfloat16)
    plain = ours(x)
    ours.pack()
    packed = ours(x)
    assert ours.weight is None and ours.packed is not None
    assert packed.dtype == torch.bfloat16 and packed.shape == plain.shape
    assert ((packed - plain).abs() <= 2**-7 * plain.abs() + 1e-2).all()
    assert not torch.allclose(packed.float(), filled(Linear(*sizes, bias)).requires_grad_(False)(x.float()) * 1.05)


@needs_bf16
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_packed_linear_gives_the_plain_ones_activation(name):
    """Some are computed within the product, before it is rounded to bf16, the others behind it."""
    ours, x = filled(Linear(33, 65), torch.bfloat16), noise(3, 5, 33, seed=9, dtype=torch.bfloat16)
    plain, bare = ours(x, ACTIVATIONS[name]), ours(x)
    assert torch.equal(plain, ACTIVATIONS[name](bare))
    ours.pack()
    packed = ours(x, ACTIVATIONS[name])
    assert ((packed - plain).abs() <= 2**-6 * plain.abs() + 1e-2).all()
    others = [ACTIVATIONS[other](bare) for other in ("relu", "silu", "gelu") if other not in name]
    assert all(((packed - other).abs() > 2**-6 * other.abs() + 1e-2).any() for other in [bare, *others])


@needs_bf16
@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_a_packed_mlp_is_the_same_in_pieces(rows, monkeypatch):
    ours = filled(layers.MLP(16, 40, ACTIVATIONS["quick_gelu"]), torch.bfloat16)
    x = noise(3, 5, 16, dtype=torch.bfloat16)
    plain = ours(x)
    ours.fc1.pack()
    ours.fc2.pack()
    monkeypatch.setattr(layers, "MLP_ROWS", rows)
    pieces = ours(x)
    torch.testing.assert_close(pieces, plain, rtol=2**-6, atol=2e-2)


@needs_bf16
def test_the_state_dict_of_a_packed_linear_is_that_of_the_plain_one():
    model = filled(nn.Sequential(Linear(24, 7), Linear(7, 5, bias=False)), torch.bfloat16)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for layer in model:
        layer.pack()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_bf16
@pytest.mark.parametrize("move", [torch.float32, torch.float64, torch.bfloat16, "meta"])
def test_moving_a_packed_linear_unpacks_it(move):
    ours = filled(Linear(24, 7), torch.bfloat16)
    weight = ours.weight.clone()
    ours.pack()
    moved = ours.to(move)
    assert moved.packed is None and moved.weight.shape == weight.shape
    if move != "meta":
        assert torch.equal(moved.weight, weight.to(moved.weight.dtype))


@needs_bf16
def test_packing_twice_is_packing_once():
    ours, x = filled(Linear(24, 7), torch.bfloat16), noise(2, 24, dtype=torch.bfloat16)
    ours.pack()
    once = ours(x)
    ours.pack()
    assert torch.equal(ours(x), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_never_packed(dtype):
    ours = filled(Linear(24, 7), dtype)
    ours.pack()
    assert ours.packed is None and ours.weight.dtype == dtype


@needs_bf16
def test_a_packed_tied_head_gives_the_numbers_of_the_table_and_owns_none():
    table = filled(nn.Embedding(40, 24), torch.bfloat16)
    model = nn.ModuleDict({"table": table, "head": TiedHead(table)})
    x = noise(2, 24, dtype=torch.bfloat16)
    plain = model["head"](x)
    model["head"].pack()
    assert ((model["head"](x) - plain).abs() <= 2**-7 * plain.abs() + 1e-2).all()
    assert list(model.state_dict()) == ["table.weight"]
    model.float()
    assert model["head"].packed is None
    assert torch.equal(model["head"](x.float()), x.float() @ table.weight.T)


# --- norms and MLPs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers_and_adds_what_it_is_told(dtype):
    ours, theirs = filled(RMSNorm(48, 1e-3), dtype), LlamaRMSNorm(48, 1e-3).to(dtype)
    theirs.weight.data = ours.weight.data
    x, residual = noise(2, 3, 48, dtype=dtype), noise(2, 3, 48, seed=1, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert torch.allclose(ours(x), theirs(x), atol=tolerance)
    normed, total = ours.add(residual, x)
    assert torch.equal(total, residual + x)
    assert torch.allclose(normed, theirs(residual + x), atol=tolerance)
    assert not torch.allclose(ours(x).float(), filled(RMSNorm(48, 1.0), dtype)(x).float(), atol=5e-2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_the_gated_mlp_equals_transformers(bias, name):
    ours = filled(GatedMLP(24, 40, activation(name), bias))
    theirs = LlamaMLP(
        LlamaConfig(hidden_size=24, num_attention_heads=2, intermediate_size=40, hidden_act=name, mlp_bias=bias)
    )
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, 3, 24)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers_and_differ_from_each_other(name):
    x = torch.linspace(-6, 6, 999)
    assert torch.allclose(activation(name)(x), ACT2FN[name](x), atol=1e-6)
    others = [ACTIVATIONS[other](x) for other in ACTIVATIONS if other != name]
    assert not any(torch.allclose(activation(name)(x), other, atol=1e-5) for other in others)


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(MinivlmError, match="'mish'.*quick_gelu"):
        activation("mish")


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_projector_is_linear_layers_with_an_activation_between_them(depth, bias):
    ours = filled(Projector(8, 6, activation("gelu"), bias, depth))
    assert {name.partition(".")[0] for name in ours.state_dict()} == {f"linear_{i + 1}" for i in range(depth)}
    x = wanted = noise(5, 8)
    for i in range(1, depth + 1):
        layer = ours.get_submodule(f"linear_{i}")
        wanted = nn.functional.linear(wanted if i == 1 else nn.functional.gelu(wanted), layer.weight, layer.bias)
    assert torch.equal(ours(x), wanted)


# --- attention --------------------------------------------------------------------------------------------------------


def attention_by_formula(q, k, v, mask):
    """softmax(q kᵀ / √K) v, head by head: query head h reads key/value head h // (H / G)."""
    B, H, T, K = q.shape
    out = torch.zeros(B, T, H, K)
    for h in range(H):
        g = h // (H // k.shape[1])
        scores = q[:, h] @ k[:, g].transpose(1, 2) / K**0.5
        out[:, :, h] = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v[:, g]
    return out.flatten(2)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5),
    st.sampled_from(["none", "causal", "mask"]),
)  # fmt: skip
def test_attention_is_its_formula(B, G, group, T, before, kind):
    before = 0 if kind == "causal" else before
    S, H, K = T + before, G * group, 4
    q, k, v = noise(B, H, T, K), noise(B, G, S, K, seed=1), noise(B, G, S, K, seed=2)
    mask = torch.ones(B, 1, T, S, dtype=torch.bool)
    if kind == "causal":
        mask = mask.tril()
    if kind == "mask":
        mask = (noise(B, 1, T, S, seed=3) > 0) | (torch.arange(S) == S - 1)
    ours = attention(q, k, v, mask if kind == "mask" else None, causal=kind == "causal")
    assert torch.allclose(ours, attention_by_formula(q, k, v, mask), atol=1e-5)


def test_attention_under_autocast_gives_the_same_numbers():
    """Training on a CPU leaves bf16 for the softmax; the result must not notice."""
    q, k, v = (noise(2, 4, 5, 8, seed=i).requires_grad_() for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(q, k, v, causal=True)
    assert torch.allclose(ours, attention(q, k, v, causal=True), atol=1e-6)
    ours.sum().backward()
    assert v.grad.abs().sum() > 0
