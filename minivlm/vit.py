"""The vision tower: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023) are one ViT with different numbers.

    pixels → patches × projection + positions → L × (x + attention(norm(x)); x + mlp(norm(x))) → hidden states

CLIP puts a class token in front and a norm before the first layer; SigLIP has neither, and a bias on its patches. A
VLM wants patch features and not the pooled vector that these towers were trained for, so it reads hidden states:
usually those *before* the last layer (`vision_feature_layer` −2), which is why the layers behind the last one asked
for are never run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.errors import MinivlmError
from minivlm.layers import MLP, Linear, activation, attention, embedding

# What sparse vision configs leave out, per `model_type`. Source: transformers' CLIPVisionConfig and SiglipVisionConfig.
DEFAULTS = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}


@dataclass(frozen=True)
class ViTConfig:
    """The numbers of a tower, from a config.json's `vision_config`."""

    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    image_size: int  # pixels, a square
    patch_size: int  # pixels, a square
    num_channels: int
    hidden_act: str
    norm_eps: float
    class_token: bool
    patch_bias: bool
    pre_norm: bool

    @property
    def grid_side(self) -> int:
        """Patches along one side of the picture; what is left over on the right and at the bottom is not looked at."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, config: dict) -> "ViTConfig":
        model_type = config.get("model_type", "clip_vision_model")
        if model_type not in DEFAULTS:
            known = ", ".join(DEFAULTS)
            raise MinivlmError(f"config.json names a vision tower of type {model_type!r}; this tower knows {known}")
        c = DEFAULTS[model_type] | config
        clip = model_type == "clip_vision_model"
        return cls(
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"],
            image_size=c["image_size"],
            patch_size=c["patch_size"],
            num_channels=c["num_channels"],
            hidden_act=c["hidden_act"],
            norm_eps=c["layer_norm_eps"],
            class_token=clip,
            patch_bias=not clip,
            pre_norm=clip,
        )


class Embeddings(nn.Module):
    """Pixels → one vector per patch (and the class token in front of them), with learned positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, p, N = config.hidden_size, config.patch_size, config.grid_side**2
        self.class_embedding = nn.Parameter(torch.empty(D)) if config.class_token else None
        self.patch_embedding = nn.Conv2d(config.num_channels, D, p, stride=p, bias=config.patch_bias)
        self.position_embedding = embedding(N + config.class_token, D)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (I, N, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)  # (I, 1 + N, D)
        return x + self.position_embedding.weight


class Attention(nn.Module):
    """Every patch looks at every patch of its own picture."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, D)
        self.v_proj = Linear(D, D)
        self.out_proj = Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        I, N, D = x.shape
        q, k, v = (p(x).view(I, N, self.num_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v))  # (I, N, D)


class Layer(nn.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(D, config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(D, config.norm_eps)
        self.mlp = MLP(D, config.intermediate_size, activation(config.hidden_act))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))  # (I, N, D)


class Encoder(nn.Module):
    """The stack of layers; returns the hidden states asked for."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])

    def forward(self, x: Tensor, wanted: list[int]) -> list[Tensor]:
        """State 0 enters the first layer, state i leaves layer i. No layer behind the last one wanted runs."""
        states = {0: x}
        for i, layer in enumerate(self.layers[: max(wanted)], start=1):
            states[i] = x = layer(x)  # (I, N, D)
            if i not in wanted:
                states[i] = None  # not kept alive
        return [states[i] for i in wanted]


class ViT(nn.Module):
    """CLIP's or SigLIP's vision tower, without the pooling head."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        if config.pre_norm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.norm_eps)  # CLIP's own spelling
        self.encoder = Encoder(config)
        # Every checkpoint carries this norm; it belongs to the pooled output, which no VLM here reads.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, pixels: Tensor, feature_layers: tuple[int, ...], drop_class_token: bool) -> Tensor:
        """Pixels `(I, 3, height, width)` → features `(I, N, D · number of feature layers)`.

        `feature_layers` index the L + 1 hidden states as Python does (−1: the last layer's output, −2: the one
        before); several are concatenated along the channels. `drop_class_token` is the strategy "default" of the
        configs, its opposite is "full".
        """
        num_states = self.config.num_layers + 1
        wanted = [i % num_states for i in feature_layers]
        x = self.embeddings(pixels)  # (I, N, D)
        if self.config.pre_norm:
            x = self.pre_layrnorm(x)
        features = torch.cat(self.encoder(x, wanted), dim=-1)
        return features[:, 1:] if drop_class_token else features


def num_features(config: ViTConfig, drop_class_token: bool) -> int:
    """How many feature vectors the tower gives for one square picture."""
    return config.grid_side**2 + config.class_token - drop_class_token


def of_tower_size(pixels: Tensor, side: int) -> Tensor:
    """`pixels (..., height, width)` as they are; raises where they are not the square that the tower has learned."""
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        raise MinivlmError(
            f"the image processor makes {height} x {width} pixels, but the vision tower sees {side} x {side}; "
            "leave size and crop_size as the checkpoint has them"
        )
    return pixels
