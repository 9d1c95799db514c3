"""Llama 3.2 Vision, "Mllama" (Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, section 7).

Pictures are not words here. The text is Llama 3.1, untouched; between its layers stand new ones that *look*: their
queries come from the text, their keys and values from the pictures, and a gate that starts at zero lets them in.

    picture → tiles → tower → projector → keys, values of every cross-attention layer, once ┐
    "<|image|>What is this?" → embeddings → 3 layers → cross-attention → 5 layers → cross-attention → … → answer

| | LLaVA-NeXT (`llava_next.py`) | Mllama |
|---|---|---|
| a picture becomes | an overview and tiles, each alone in CLIP | up to 4 tiles, in *one* sequence of its own tower |
| tile positions | the order of tokens, newlines | a learned vector per aspect ratio and tile, gated |
| tokens in the prompt | up to 2880 | 1, the place from which on the picture may be seen |
| text model | trained on | frozen; a text-only prompt passes as if the new layers were not there |
| embedding table | as many rows as the head | 8 rows more: nothing can answer `<|image|>` |

Where Meta's code and transformers disagree, this is Meta's: see `VisionModel` and `CrossLayer`.

Sections: configuration, the vision tower, cross-attention, the model, tiles, the processor.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache import KVCache
from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder, DecoderConfig, DecoderLayer, Step
from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel
from minivlm.image_config import ImageConfig
from minivlm.images import normalise, resize, split_tiles
from minivlm.inputs import Inputs, Prompt
from minivlm.layers import MLP, GatedMLP, Linear, RMSNorm, activation, attention, embedding
from minivlm.processor import BaseProcessor
from minivlm.vit import of_tower_size

# Parameter prefixes here → their spellings in checkpoints: the hub's published one first, then that of transformers
# 4.52 and later (see weights.py). "model" alone: text-only checkpoints.
KEYS = {
    "language_model": ("language_model.model", "model.language_model", "model"),
    "language_model.lm_head": ("language_model.lm_head", "lm_head"),
    "vision_model": ("vision_model", "model.vision_model"),
    "multi_modal_projector": ("multi_modal_projector", "model.multi_modal_projector"),
}

EXTRA_EMBEDDINGS = 8  # rows behind the vocabulary, the first of them <|image|>; the head has none of them

# For folders without a chat template, which are base models: they go on with a text, and know no turns.
TEMPLATE = (
    "{% if messages | length > 1 or messages[0].role != 'user' %}"
    "{{ raise_exception('this base model has no chat template: give it one user message, or a Prompt') }}"
    "{% endif %}"
    "{% for part in messages[0].content if part.type == 'image' %}<|image|>{% endfor %}{{ bos_token }}"
    "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
)


# ------------------------------------------------------------------------------------------------------- configuration

# What sparse configs leave out. Source: transformers' MllamaVisionConfig and MllamaTextConfig.
VISION_DEFAULTS = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "max_num_tiles": 4,
    "intermediate_layers_indices": (3, 7, 15, 23, 30),
    "supported_aspect_ratios": ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)),
}
TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38),
}


@dataclass(frozen=True)
class VisionConfig:
    """The numbers of the tower, from a config.json's `vision_config`."""

    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_global_layers: int
    num_heads: int  # H
    image_size: int  # pixels of a tile, a square
    patch_size: int  # pixels, a square
    num_channels: int
    hidden_act: str
    norm_eps: float
    num_tiles: int  # I, the most that a picture is cut into
    taken_layers: tuple[int, ...]  # the states that enter these layers are features, too
    aspect_ratios: tuple[tuple[int, int], ...]  # (rows, columns) of tiles; a picture's id is the index here plus one

    @property
    def num_patches(self) -> int:
        """P: feature vectors of one tile, its class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def num_features(self) -> int:
        """Channels of a feature vector: the tower's output and the states taken on the way."""
        return self.hidden_size * (1 + len(self.taken_layers))

    @classmethod
    def from_hf(cls, config: dict) -> "VisionConfig":
        c = VISION_DEFAULTS | {key: value for key, value in config.items() if value is not None}
        taken = tuple(c["intermediate_layers_indices"])
        if not all(0 <= i < c["num_hidden_layers"] for i in taken):
            raise MinivlmError(
                f"config.json: intermediate_layers_indices is {list(taken)}, but the tower's layers are 0 to "
                f"{c['num_hidden_layers'] - 1}"
            )
        ratios = tuple((rows, columns) for rows, columns in c["supported_aspect_ratios"])
        if not all(1 <= rows * columns <= c["max_num_tiles"] for rows, columns in ratios):
            raise MinivlmError(f"config.json: supported_aspect_ratios do not fit into {c['max_num_tiles']} tiles")
        return cls(
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_global_layers=c["num_global_layers"],
            num_heads=c["attention_heads"],
            image_size=c["image_size"],
            patch_size=c["patch_size"],
            num_channels=c["num_channels"],
            hidden_act=c["hidden_act"],
            norm_eps=c["norm_eps"],
            num_tiles=c["max_num_tiles"],
            taken_layers=taken,
            aspect_ratios=ratios,
        )


@dataclass(frozen=True)
class MllamaConfig:
    text: DecoderConfig
    cross_layers: tuple[int, ...]  # which of the text model's layers look at the pictures
    vision: VisionConfig | None  # None: a checkpoint of the text model alone
    image_token_id: int

    @classmethod
    def from_hf(cls, config: dict) -> "MllamaConfig":
        text_only = config.get("model_type") == "mllama_text_model"
        text = config if text_only else config.get("text_config") or {}
        text = TEXT_DEFAULTS | {key: value for key, value in text.items() if value is not None}
        return cls(
            # All but the new layers is a Llama. Never tied: the head has fewer rows than the table.
            text=DecoderConfig.from_hf(text | {"model_type": "llama"}, tied=False),
            cross_layers=tuple(text["cross_attention_layers"]),
            vision=None if text_only else VisionConfig.from_hf(config.get("vision_config") or {}),
            image_token_id=config.get("image_token_index", config.get("image_token_id", 128256)),
        )


def image_defaults(config: MllamaConfig) -> dict:
    """What transformers' MllamaImageProcessor takes where a folder's file is silent, at the tower's own size."""
    vision = config.vision or VisionConfig.from_hf({})
    return {
        "do_resize": True, "size": {"height": vision.image_size, "width": vision.image_size}, "resample": 2,
        "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
        "do_pad": True, "max_image_tiles": vision.num_tiles,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the vision tower


class TilePositions(nn.Module):
    """One learned vector per tile of each aspect ratio, behind a gate."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.shape = config.num_tiles, config.hidden_size
        self.embedding = embedding(len(config.aspect_ratios) + 1, config.num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.empty(1))

    def forward(self, ratio_id: Tensor) -> Tensor:
        return self.gate.tanh() * self.embedding(ratio_id).view(self.shape)  # (I, D)


class PatchPositions(nn.Module):
    """One learned vector per patch; the gate fades from one table for all tiles to one of its own for each tile."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.shape = config.num_tiles, config.num_patches, config.hidden_size
        self.embedding = nn.Parameter(torch.empty(config.num_patches, config.hidden_size))
        self.tile_embedding = embedding(
            len(config.aspect_ratios) + 1, config.num_tiles * config.num_patches * config.hidden_size
        )
        self.gate = nn.Parameter(torch.empty(1))

    def forward(self, ratio_id: Tensor) -> Tensor:
        gate = self.gate.tanh()
        return (1 - gate) * self.embedding + gate * self.tile_embedding(ratio_id).view(self.shape)  # (I, P, D)


class VisionAttention(nn.Module):
    """Every patch of a picture looks at every patch of all its tiles."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = Linear(D, D, bias=False)
        self.k_proj = Linear(D, D, bias=False)
        self.v_proj = Linear(D, D, bias=False)
        self.o_proj = Linear(D, D, bias=False)

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        """`x (1, S, D)`, the real patches first. Those see everything, padding included; padding sees them alone.

        That is the rule of Meta's mask, an S × S tensor (S is 6432) that is closed only where padding looks at padding.
        Sorted, it is two products without any mask.
        """
        _, S, _ = x.shape
        q, k, v = (p(x).view(1, S, self.num_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        real = attention(q[:, :, :num_real], k, v)  # (1, real, D)
        padding = attention(q[:, :, num_real:], k[:, :, :num_real], v[:, :, :num_real])  # (1, padding, D)
        return self.o_proj(torch.cat([real, padding], dim=1))  # (1, S, D)


class VisionLayer(nn.Module):
    """h = x + g · attention(norm(x)); h + g' · mlp(norm(h)); the gates are 1 in the local layers."""

    def __init__(self, config: VisionConfig, gated: bool):
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = nn.LayerNorm(D, config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(D, config.norm_eps)
        self.mlp = MLP(D, config.intermediate_size, activation(config.hidden_act))
        self.gate_attn = nn.Parameter(torch.empty(1)) if gated else None
        self.gate_ffn = nn.Parameter(torch.empty(1)) if gated else None

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        x = x + gated(self.self_attn(self.input_layernorm(x), num_real), self.gate_attn)
        return x + gated(self.mlp(self.post_attention_layernorm(x)), self.gate_ffn)  # (1, S, D)


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate.tanh() * x


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(config, gated) for _ in range(num_layers)])

    def forward(self, x: Tensor, num_real: int, taken: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """The last state, and those that enter the layers `taken`."""
        states = {}
        for i, layer in enumerate(self.layers):
            if i in taken:
                states[i] = x
            x = layer(x, num_real)  # (1, S, D)
        return x, [states[i] for i in taken]


class VisionModel(nn.Module):
    """A ViT over all tiles of a picture at once: local layers, whose states are features, too, then gated global ones.

    The states taken are those that *enter* the layers named in the config, as in Meta's code and the first releases of
    transformers; later ones take what leaves them, which is another model.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D, p = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, D, p, stride=p, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.pre_tile_positional_embedding = TilePositions(config)
        self.gated_positional_embedding = PatchPositions(config)
        self.layernorm_pre = nn.LayerNorm(D)
        self.transformer = Encoder(config, config.num_layers, gated=False)
        self.layernorm_post = nn.LayerNorm(D)
        self.post_tile_positional_embedding = TilePositions(config)
        self.global_transformer = Encoder(config, config.num_global_layers, gated=True)

    def forward(self, pixels: Tensor, ratio_id: Tensor, num_tiles: int) -> Tensor:
        """One picture: `pixels (I, 3, height, width)`, zeros behind its `num_tiles`, and the id of its aspect ratio.

        Returns the features of the real tiles, one tile after another, `(num_tiles · P, num_features)`. The padding
        behind them (whole tiles, and what fills each tile up to a multiple of 8) cannot be left out before: the
        checkpoints were trained with real patches looking at it.
        """
        P = self.config.num_patches
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (I, P − 1, D)
        I, _, D = x.shape
        x = x + self.pre_tile_positional_embedding(ratio_id)[:, None]
        x = torch.cat([self.class_embedding.expand(I, 1, D), x], dim=1)  # (I, P, D)
        x = self.layernorm_pre(x + self.gated_positional_embedding(ratio_id))
        x = F.pad(x, (0, 0, 0, -P % 8))  # (I, slots, D)
        slots = x.shape[1]
        order, num_real = real_first(num_tiles, P, I, slots, x.device)
        x = x.flatten(0, 1)[None, order]  # (1, I · slots, D)
        x, taken = self.transformer(x, num_real, self.config.taken_layers)
        x = self.layernorm_post(x) + self.post_tile_positional_embedding(ratio_id)[order // slots]
        x, _ = self.global_transformer(x, num_real)
        taken = torch.stack([state[0, :num_real] for state in taken], dim=-1).flatten(1)  # channel by channel
        return torch.cat([x[0, :num_real], taken], dim=-1)  # (num_tiles · P, num_features)


def real_first(num_tiles: int, P: int, I: int, slots: int, device) -> tuple[Tensor, int]:
    """The order `(I · slots,)` that puts the patches of real tiles before all padding, and how many those are."""
    tile, slot = torch.arange(I, device=device)[:, None], torch.arange(slots, device=device)
    real = ((tile < num_tiles) & (slot < P)).flatten()
    return torch.cat([real.nonzero(), (~real).nonzero()])[:, 0], num_tiles * P


# ----------------------------------------------------------------------------------------------------- cross-attention


class CrossAttention(nn.Module):
    """Queries from the text, keys and values from the pictures; no rotary positions, but norms on queries and keys."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim = K
        self.q_proj = Linear(D, H * K, bias=False)
        self.k_proj = Linear(D, G * K, bias=False)
        self.v_proj = Linear(D, G * K, bias=False)
        self.o_proj = Linear(H * K, D, bias=False)
        self.q_norm = RMSNorm(K, config.norm_eps)
        self.k_norm = RMSNorm(K, config.norm_eps)

    def remember(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Picture tokens `(B, M, D)` → keys and values `(B, G, M, K)`, which hold for every token to come."""
        k = self.k_proj(states).unflatten(-1, (-1, self.head_dim))  # (B, M, G, K)
        v = self.v_proj(states).unflatten(-1, (-1, self.head_dim))  # (B, M, G, K)
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # (B, H, T, K)
        return self.o_proj(attention(q, k, v, visible))  # (B, T, D)


class CrossLayer(nn.Module):
    """h = x + tanh(g) · attention(norm(x), pictures); h + tanh(g') · mlp(norm(h)); for tokens that see a picture.

    For all others the layer does nothing at all: text before its first picture, and rows without one. That is Meta's
    rule, and the one by which a row says in a batch what it says alone. transformers stops the MLP only, so that there
    such tokens take in a bit of every picture of the batch.
    """

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = nn.Parameter(torch.empty(1))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation(config.hidden_act))
        self.cross_attn_mlp_gate = nn.Parameter(torch.empty(1))

    def remember(self, states: Tensor) -> dict[str, Tensor]:
        k, v = self.cross_attn.remember(states)
        return {f"keys.{self.index}": k, f"values.{self.index}": v}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        memory = step.memory
        if not memory:  # no picture in the whole batch
            return x
        k, v, sees = memory[f"keys.{self.index}"], memory[f"values.{self.index}"], memory["sees"]
        looked = self.cross_attn(self.input_layernorm(x), k, v, memory["visible"])
        x = x + self.cross_attn_attn_gate.tanh() * sees * looked
        return x + self.cross_attn_mlp_gate.tanh() * sees * self.mlp(self.post_attention_layernorm(x))  # (B, T, D)


# ----------------------------------------------------------------------------------------------------------- the model


class Head(Linear):
    """No row for `<|image|>`, so that no answer can be a picture. Those who train on it add one, which is left out."""

    cuts_rows = True


class Model(BaseModel):
    Config = MllamaConfig

    def __init__(self, config: MllamaConfig):
        super().__init__()
        self.config = config
        text, vision = config.text, config.vision
        self.vision_model = None if vision is None else VisionModel(vision)
        self.multi_modal_projector = None if vision is None else Linear(vision.num_features, text.hidden_size)
        layers = [(CrossLayer if i in config.cross_layers else DecoderLayer)(text, i) for i in range(text.num_layers)]
        self.language_model = Decoder(text, layers)
        self.language_model.embed_tokens = embedding(text.vocab_size + EXTRA_EMBEDDINGS, text.hidden_size)
        self.language_model.lm_head = Head(text.hidden_size, text.vocab_size, bias=False)

    def encode_images(self, inputs: Inputs) -> Tensor:
        """The tokens of all pictures, padding left out, `(N, D)`: num_tiles · P for each picture, row by row."""
        real = inputs.aspect_ratio_ids > 0  # (B, pictures)
        counts = inputs.aspect_ratio_mask[real].sum(1).tolist()
        pictures = zip(inputs.pixel_values[real], inputs.aspect_ratio_ids[real], counts, strict=True)
        features = torch.cat([self.vision_model(pixels, ratio_id, count) for pixels, ratio_id, count in pictures])
        return self.multi_modal_projector(features)

    def remember(self, inputs: Inputs) -> dict[str, Tensor]:
        """All that cross-attention needs to know of the pictures, for the whole conversation; empty without pictures.

        `keys.i` and `values.i (B, G, M, K)` of each layer i, M the picture tokens of the row that has most of them;
        `visible (B, 1, T, M)` bool, who may look at what; `sees (B, T, 1)` bool, who may look at anything.
        """
        if inputs.pixel_values is None:
            return {}
        P = self.config.vision.num_patches
        real = inputs.aspect_ratio_mask.bool() & (inputs.aspect_ratio_ids > 0)[..., None]  # (B, pictures, tiles)
        states = self.encode_images(inputs).split((real.sum((1, 2)) * P).tolist())
        states = pad_sequence(states, batch_first=True)  # (B, M, D)
        by_tile = [mask[:, own] for mask, own in zip(inputs.cross_attention_mask.bool(), real, strict=True)]  # (T, …)
        visible = pad_sequence([mask.T.repeat_interleave(P, 0) for mask in by_tile], batch_first=True)  # (B, M, T)
        visible = visible.transpose(1, 2)[:, None]  # (B, 1, T, M)
        sees = visible.any(-1, keepdim=True)[:, 0]  # (B, T, 1)
        # A softmax over nothing is NaN: who sees nothing looks at everything, and is multiplied by 0 afterwards.
        memory = {"visible": visible | ~sees[:, None], "sees": sees}
        for i in self.config.cross_layers:
            memory |= self.language_model.layers[i].remember(states)
        return memory

    def forward(self, inputs: Inputs, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits `(B, T, V)` float32; `(B, 1, V)` with `last_only`, which is all that generation needs."""
        memory = self.remember(inputs)
        x = self.language_model.embed_tokens(inputs.input_ids)
        logits = self.language_model(x, inputs.attention_mask, cache=cache, last_only=last_only, memory=memory)
        if cache is not None and memory:
            # An answer sees what the last token of its prompt sees.
            cache.memory = memory | {"visible": memory["visible"][:, :, -1:], "sees": memory["sees"][:, -1:]}
        return logits


# --------------------------------------------------------------------------------------------------------------- tiles


def choose_canvas(size: tuple[int, int], ratios: list[tuple[int, int]], tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles for a picture of `size` (height, width): the least enlarging canvas that holds it.

    If every canvas is too small, the one that shrinks least. Of equals the smallest, then the first.
    """
    height, width = size
    scales = {(rows, columns): min(rows * tile / height, columns * tile / width) for rows, columns in ratios}
    best = min((scale for scale in scales.values() if scale >= 1), default=max(scales.values()))
    return min((ratio for ratio in ratios if scales[ratio] == best), key=lambda ratio: ratio[0] * ratio[1])


def fitted_size(size: tuple[int, int], canvas: tuple[int, int], tile: int) -> tuple[int, int]:
    """(height, width) that a picture is resized to: into the canvas, enlarged at most until a side fills a tile.

    The other side by floor(), at least one pixel (anyres takes ceil()).
    """
    height, width = size
    to_height, to_width = min(max(height, tile), canvas[0]), min(max(width, tile), canvas[1])
    scale_height, scale_width = to_height / height, to_width / width
    if scale_width < scale_height:
        return min(int(height * scale_width) or 1, to_height), to_width
    return to_height, min(int(width * scale_height) or 1, to_width)


def cut(picture: Image.Image, images: ImageConfig, vision: VisionConfig) -> tuple[Tensor, int]:
    """RGB picture → tiles `(rows · columns, 3, tile, tile)` float32, and the id of their aspect ratio. The picture is
    in the canvas's upper left corner, the rest is black."""
    size, tile = (picture.height, picture.width), images.size.height
    ratios = [ratio for ratio in vision.aspect_ratios if ratio[0] * ratio[1] <= images.max_image_tiles]
    rows, columns = choose_canvas(size, ratios, tile)
    canvas = Image.new("RGB", (columns * tile, rows * tile))
    canvas.paste(resize(picture, fitted_size(size, (rows * tile, columns * tile), tile), images.resample))
    tiles = torch.stack([normalise(view, images) for view in split_tiles(canvas, tile)])
    return of_tower_size(tiles, vision.image_size), vision.aspect_ratios.index((rows, columns)) + 1


def sights(places: list[int], length: int) -> list[tuple[int, int]]:
    """Which tokens may see each picture: from its own (start) up to the next picture's (end).

    Pictures side by side are seen together: 2 and 3 of `<|image|>a<|image|><|image|>b` both by b, 1 only by a.
    """
    ends = [*places[1:], length][: len(places)]
    for i in reversed(range(len(places) - 1)):
        if places[i + 1] == places[i] + 1:
            ends[i] = ends[i + 1]
    return list(zip(places, ends, strict=True))


# ------------------------------------------------------------------------------------------------------- the processor


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = MllamaConfig, TEMPLATE

    @classmethod
    def read_images(cls, folder: Path, config: MllamaConfig) -> ImageConfig:
        return ImageConfig.from_folder(folder, image_defaults(config))

    def complete(self, prompt: Prompt) -> Prompt:
        """A raw prompt without BOS gets one behind the pictures that it begins with, where the base models expect it.

        If there are pictures, the tokenizer puts another in front of them, as it does in the reference.
        """
        bos = self.tokenizer.bos_token or ""
        if bos in prompt.text:
            return prompt
        pictures = re.match(r"(<\|image\|>)*", prompt.text)[0]
        return replace(prompt, text=pictures + bos + prompt.text.removeprefix(pictures))

    def see(self, rows: list[Row], images: ImageConfig) -> dict[str, Tensor]:
        """Under transformers' names and in its shapes: all rows have as many pictures, all pictures as many tiles, as
        the largest; the others are zeros."""
        vision, most = self.config.vision, max((len(row.pictures) for row in rows), default=0)
        if most:
            check_images(images, vision)
        for row in rows:
            expand(row, {self.config.image_token_id: [1] * len(row.pictures)})
        if not most:
            return {}
        I, B, T = vision.num_tiles, len(rows), max(len(row.ids) for row in rows)
        pixels = torch.zeros(B, most, I, vision.num_channels, vision.image_size, vision.image_size)
        ratio_ids = torch.zeros(B, most, dtype=torch.int64)
        tile_mask = torch.zeros(B, most, I, dtype=torch.int64)
        tile_mask[:, :, 0] = 1  # of a picture that is not there, too: so in the reference
        cross_mask = torch.zeros(B, T, most, I, dtype=torch.int64)
        for b, row in enumerate(rows):
            padding = T - len(row.ids)
            places = [padding + i for i, token_id in enumerate(row.ids) if token_id == self.config.image_token_id]
            for n, (picture, (start, end)) in enumerate(zip(row.pictures, sights(places, T), strict=True)):
                tiles, ratio_ids[b, n] = cut(picture, images, vision)
                pixels[b, n, : len(tiles)] = tiles
                tile_mask[b, n, : len(tiles)] = 1
                cross_mask[b, start:end, n, : len(tiles)] = 1
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ratio_ids,
            "aspect_ratio_mask": tile_mask,
            "cross_attention_mask": cross_mask,
        }


def check_images(images: ImageConfig, vision: VisionConfig | None):
    """Settings that another model's file would use, or that do not fit the tower."""
    if vision is None:
        raise MinivlmError("this checkpoint is a text model alone: it cannot be given a picture")
    if not (images.do_resize and images.do_pad) or images.do_center_crop or images.size.height != images.size.width:
        raise MinivlmError("the image processor must resize and pad to square tiles, without do_center_crop")
    if images.max_image_tiles > vision.num_tiles:
        raise MinivlmError(f"max_image_tiles is {images.max_image_tiles}, the tower sees {vision.num_tiles}")
