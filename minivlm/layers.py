"""The blocks that decoders and vision towers are made of: linear, norm, MLPs, attention, projector.

Parameter names are the checkpoints' (`gate_proj`, `fc1`, `linear_1`), so that a key in a file can be searched for here.
Nothing is initialised: weights come from a checkpoint, or from `train.initialise`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import ops
from minivlm.errors import MinivlmError


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation x · σ(1.702 x), which CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation, which SigLIP was trained with."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


# What oneDNN computes within a packed product, in its words. (Its "swish" would do for silu, and saves nothing.)
FUSED = {None: ("none", [], ""), F.gelu: ("gelu", [], "none"), gelu_tanh: ("gelu", [], "tanh")}
# Beyond some 600 rows, oneDNN shares out a small packed product badly between two threads and loses a third of its
# speed; in pieces it keeps it. Larger ones are best left whole.
SMALL_WEIGHT, SMALL_PIECE = 2**21, 384  # elements, rows


def activation(name: str):
    """The function that a config's `hidden_act` names."""
    if name not in ACTIVATIONS:
        raise MinivlmError(f"config.json asks for the activation {name!r}; known here: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, num_rows: int) -> Tensor:
    """`function(x)` of `x (..., width)`, computed for `num_rows` rows at a time."""
    if x.numel() <= num_rows * x.shape[-1]:
        return function(x)
    pieces = x.flatten(0, -2).split(num_rows)
    return torch.cat([function(piece) for piece in pieces]).unflatten(0, x.shape[:-1])


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table without the random numbers torch would put into it (and, on the meta device, import 800 modules for)."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class Linear(nn.Module):
    """y = x Wᵀ + b, with a second, faster form of the same weight for bfloat16 inference on a CPU.

    Decoding one token reads every weight once, so its speed is memory bandwidth, and the plain bf16 product reaches
    only a third to a half of that. `pack()` rearranges the weight once into oneDNN's blocked layout, which serves one
    row (decode) and many (prefill) alike. Readers need not care: the numbers are the same, `state_dict()` gives the
    plain weight back, and moving the module to another device or dtype unpacks it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.packed = None

    def forward(self, x: Tensor, act=None) -> Tensor:
        """With `act`, one of ACTIVATIONS: act(x Wᵀ + b)."""
        if self.packed is None:
            y = F.linear(x, self.weight, self.bias)
            return y if act is None else act(y)
        if act not in FUSED:
            return act(self(x))

        def product(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *FUSED[act])

        return in_pieces(product, x, SMALL_PIECE) if self.packed.numel() <= SMALL_WEIGHT else product(x)

    def pack(self):
        """Swaps the weight for its packed form where that pays (bf16 on a CPU with oneDNN); elsewhere does nothing."""
        if self.packed is None and can_pack(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
            self.weight = None

    def unpack(self):
        if self.packed is not None:
            self.weight = nn.Parameter(self.packed.to_dense(), requires_grad=False)
            self.packed = None

    def _apply(self, fn, *args, **kwargs):  # what .to(), .cuda() and .float() call
        self.unpack()
        return super()._apply(fn, *args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.to_dense()


def can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()


class TiedHead(nn.Module):
    """The output head of models that use the embedding table for it. Owns no parameter; packing makes a second copy."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = [embedding]  # in a list, so that torch does not register the table a second time
        self.packed = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.embedding[0].weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def pack(self):
        if self.packed is None and can_pack(self.embedding[0].weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.embedding[0].weight.detach(), None)

    def _apply(self, fn, *args, **kwargs):
        self.packed = None
        return super()._apply(fn, *args, **kwargs)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · w, the mean in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x), in one pass over memory."""
        return ops.add_rms_norm(residual, x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)): SwiGLU where `act` is silu (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, act, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias)
        self.up_proj = Linear(width, hidden, bias)
        self.down_proj = Linear(hidden, width, bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


MLP_ROWS = 1024  # that a packed MLP takes at once; below 500, reading the weights again costs more than it saves


class MLP(nn.Module):
    """fc2(act(fc1(x))), the vision towers' MLP."""

    def __init__(self, width: int, hidden: int, act):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x, self.act))

        # Inference on a CPU. What is between the products is several times as wide as x; for large pictures the system
        # would give and take hundreds of megabytes in every layer. A piece's stay with the process.
        return mlp(x) if self.fc1.packed is None else in_pieces(mlp, x, MLP_ROWS)


class Projector(nn.Module):
    """Vision features → the decoder's width: `depth` linear layers with an activation between them.

    Depth 1 is the linear projector of the first LLaVA, depth 2 the `mlp2x_gelu` of LLaVA-1.5 and everything after it.
    """

    def __init__(self, in_features: int, out_features: int, act, bias: bool = True, depth: int = 2):
        super().__init__()
        self.depth, self.act = depth, act
        for i in range(1, depth + 1):
            self.add_module(f"linear_{i}", Linear(in_features if i == 1 else out_features, out_features, bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("linear_1")(x)
        for i in range(2, self.depth + 1):
            x = self.get_submodule(f"linear_{i}")(self.act(x))
        return x


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √K) v with grouped key/value heads: query head h reads key/value head h // (H / G).

    `q (B, H, T, K)`, `k` and `v (B, G, S, K)`, `mask` bool, broadcastable to `(B, 1, T, S)`, True where a query may
    look. Returns `(B, T, H * K)`.
    """
    B, H, T, K = q.shape
    G = k.shape[1]
    if T == 1 and G < H:
        # One query row: the heads of a group are rows of one product with their shared keys, and nothing is repeated.
        out = F.scaled_dot_product_attention(q.reshape(B, G, H // G, K), k, v, mask)
        return out.reshape(B, 1, H * K)
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # Training on a CPU: the backward of a short attention is several times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, causal)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=G < H)  # (B, H, T, K)
    return out.transpose(1, 2).reshape(B, T, H * K)
