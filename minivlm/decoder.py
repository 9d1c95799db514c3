"""The language model: Llama 1–3, Vicuna, Mistral, Yi and Qwen1.5/2 are one decoder with different numbers.

    tokens → embed_tokens → L × (x + attention(norm(x)); x + mlp(norm(x))) → norm → lm_head → logits

What differs between them is in `DecoderConfig`: biases, grouped heads, a sliding window, the rotary scaling, a tied
head. A family that needs another kind of layer (Mllama's cross-attention) puts its own class into `layers`: a layer
is anything that is called as `layer(x, step)`.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from minivlm import ops
from minivlm.cache import KVCache, causal_mask
from minivlm.errors import MinivlmError
from minivlm.layers import GatedMLP, Linear, RMSNorm, TiedHead, activation, attention, embedding
from minivlm.positions import Rope, RopeConfig, text_positions

# What the hub's sparse text configs leave out, per `model_type`. Source: transformers' configuration classes
# (LlamaConfig, MistralConfig, Qwen2Config and so on), whose defaults the published files rely on.
_COMMON = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": True,
    "max_window_layers": 0,
}
DEFAULTS = {
    "llama": {**_COMMON, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "qwen2_vl_text": {
        **_COMMON,
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 80,
    },
}


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a decoder, from a config.json's text part."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # K
    norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding table
    rope: RopeConfig
    sliding_window: int | None
    first_windowed_layer: int  # layers from this index on see the window only

    @classmethod
    def from_hf(cls, config: dict, tied: bool | None = None) -> "DecoderConfig":
        """`config` is the text part of a config.json; what it leaves out is completed with its `model_type`'s defaults.

        `tied` overrides `tie_word_embeddings`, which multimodal configs also keep outside the text part.
        """
        model_type = config.get("model_type", "llama")
        if model_type not in DEFAULTS:
            known = ", ".join(DEFAULTS)
            raise MinivlmError(f"config.json names a text model of type {model_type!r}; this decoder knows {known}")
        c = DEFAULTS[model_type] | {key: value for key, value in config.items() if value is not None}
        head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
        qwen = model_type.startswith("qwen2")  # biases on q, k, v by design, and no key in the config that says so
        no_window = not c["use_sliding_window"] or ("sliding_window" in config and config["sliding_window"] is None)
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
            head_dim=head_dim,
            norm_eps=c["rms_norm_eps"],
            hidden_act=c["hidden_act"],
            qkv_bias=c["attention_bias"] or qwen,
            output_bias=c["attention_bias"],
            mlp_bias=c["mlp_bias"],
            tied=config.get("tie_word_embeddings", False) if tied is None else tied,
            rope=RopeConfig.from_hf(c, head_dim),
            sliding_window=None if no_window else c["sliding_window"],
            first_windowed_layer=c["max_window_layers"],
        )


@dataclass
class Step:
    """What every layer of one forward pass shares; made once per pass."""

    positions: Tensor  # (B, T), or (3, B, T) for M-RoPE
    inv_freq: Tensor  # (K / 2,) radians per position
    rope_scale: float
    sections: tuple[int, ...] | None  # channel pairs per row of (3, B, T) positions
    mask: Tensor | None  # (B or 1, 1, T, S) bool; None: plain causal
    window_mask: Tensor | None  # the same for layers with a sliding window
    cache: KVCache | None
    memory: dict[str, Tensor] | None = None  # what a family's own layers read (Mllama: keys and values of pictures)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads (GQA, Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.index, self.head_dim = index, K
        self.windowed = config.sliding_window is not None and index >= config.first_windowed_layer
        self.q_proj = Linear(D, H * K, config.qkv_bias)
        self.k_proj = Linear(D, G * K, config.qkv_bias)
        self.v_proj = Linear(D, G * K, config.qkv_bias)
        self.o_proj = Linear(H * K, D, config.output_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        B, T, D = x.shape
        K = self.head_dim
        q = self.q_proj(x).view(B, T, -1, K)  # (B, T, H, K)
        k = self.k_proj(x).view(B, T, -1, K)  # (B, T, G, K)
        v = self.v_proj(x).view(B, T, -1, K)  # (B, T, G, K)
        q, k = ops.apply_rope(q, k, step.positions, step.inv_freq, step.sections, step.rope_scale)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, K)
        if step.cache is not None:
            k, v = step.cache.append(self.index, k, v)  # (B, G, S, K)
        mask = step.window_mask if self.windowed else step.mask
        return self.o_proj(attention(q, k, v, mask, causal=mask is None and T > 1))  # (B, T, D)


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        act = activation(config.hidden_act)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, act, config.mlp_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        normed, h = self.post_attention_layernorm.add(x, self.self_attn(self.input_layernorm(x), step))
        return h + self.mlp(normed)  # (B, T, D)


class Decoder(nn.Module):
    """Token embeddings, the stack of layers, the final norm and the head."""

    def __init__(self, config: DecoderConfig, layers: list[nn.Module] | None = None):
        """`layers` replaces the stack of plain ones, for families with layers of their own."""
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers or [DecoderLayer(config, i) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if config.tied:
            self.lm_head = TiedHead(self.embed_tokens)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = Rope(config.rope)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        memory: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings `(B, T, D)` of a whole prompt → logits `(B, T, V)` float32, or `(B, 1, V)` of the last token
        alone.

        `attention_mask (B, T)` is 0 on left padding. `positions` are `(B, T)`, by default each row's own count of
        real tokens, or `(3, B, T)` for M-RoPE. `cache` must be fresh; it is filled, so that `decode` can go on.
        `memory` is for layers of a family's own; in `decode` they get `cache.memory`.
        """
        T = x.shape[1]
        if positions is None:
            positions = text_positions(attention_mask)
        padding = attention_mask == 0
        padding = padding if bool(padding.any()) else None
        if cache is not None:
            cache.padding = padding
            # Where the text goes on: one past the largest position in use (of all three rows, in M-RoPE).
            last = positions.amax(dim=(0, 2)) if positions.dim() == 3 else positions.amax(dim=1)
            cache.position_delta = last + 1 - T
        step = self.step(positions, None if padding is None else ~padding, cache, T, memory)
        return self.run(x, step, last_only)

    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """One further token for every row: ids `(B, 1)` → logits `(B, V)` float32. The cache moves on by one."""
        S = cache.length + 1
        positions = (cache.position_delta + cache.length)[:, None]  # (B, 1)
        step = self.step(positions, cache.key_mask(S), cache, 1, cache.memory)
        return self.run(self.embed_tokens(token_ids), step)[:, 0]  # (B, V)

    def step(
        self,
        positions: Tensor,
        key_mask: Tensor | None,
        cache: KVCache | None,
        T: int,
        memory: dict[str, Tensor] | None,
    ) -> Step:
        """Masks and frequencies for T new tokens, once for all layers."""
        config = self.config
        S = T if cache is None else cache.length + T
        inv_freq, scale = self.rope.at(S, positions.device)
        mask = causal_mask(T, S, key_mask, None, positions.device)
        window_mask = mask
        if config.sliding_window is not None:
            window_mask = causal_mask(T, S, key_mask, config.sliding_window, positions.device)
        sections = config.rope.sections if positions.dim() == 3 else None
        return Step(positions, inv_freq, scale, sections, mask, window_mask, cache, memory)

    def run(self, x: Tensor, step: Step, last_only: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, step)  # (B, T, D)
        if step.cache is not None:
            step.cache.advance(x.shape[1])
        if last_only:
            x = x[:, -1:]
        return self.lm_head(self.norm(x)).float()  # (B, T or 1, V)
