"""LLaVA-1.5 (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", arXiv:2310.03744).

The whole idea in one line: the patch features of a CLIP tower, sent through a two-layer MLP, are *words* to the
language model.

    picture → CLIP, second-last layer → (576, 1024) → projector → (576, 4096) ┐
    "USER: <image>\\nWhat is this? ASSISTANT:" → token embeddings ────────────┴→ decoder → answer

Sections: configuration, the model, the processor. This is the first model to read; every later file opens with what
it changes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder, DecoderConfig
from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel, embed
from minivlm.image_config import CLIP_DEFAULTS, ImageConfig
from minivlm.images import to_pixels
from minivlm.inputs import Inputs
from minivlm.layers import Projector, activation
from minivlm.processor import BaseProcessor
from minivlm.vit import ViT, ViTConfig, num_features, of_tower_size

# Parameter prefixes here → their spellings in checkpoints: the hub's published one first, then those of transformers
# 4.52 and 5 (see weights.py).
KEYS = {
    "language_model": ("language_model.model", "model.language_model"),
    "language_model.lm_head": ("language_model.lm_head", "lm_head"),
    "vision_tower": (
        "vision_tower.vision_model",
        "vision_tower",
        "model.vision_tower.vision_model",
        "model.vision_tower",
    ),
    "multi_modal_projector": ("multi_modal_projector", "model.multi_modal_projector"),
}

# The tower of a config.json without a `vision_config`: CLIP-L/14 at 336 pixels. Source: transformers' LlavaConfig.
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

# For folders without a chat template: the one llava-hf ships. Pictures first, then text; no system sentence.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }} {% endgeneration %}"
    "{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LlavaConfig:
    """What a config.json of the LLaVA kind says besides the tower's and the decoder's numbers."""

    text: DecoderConfig
    vision: ViTConfig
    image_token_id: int
    feature_layers: tuple[int, ...]  # indices into the tower's hidden states; several are concatenated
    drop_class_token: bool
    projector_act: str
    projector_bias: bool
    projector_depth: int  # linear layers; the hub's models have two, and no field for it

    @classmethod
    def from_hf(cls, config: dict) -> "LlavaConfig":
        layers = config.get("vision_feature_layer", -2)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise MinivlmError(f"config.json: vision_feature_select_strategy must be default or full, not {strategy!r}")
        vision = config.get("vision_config")
        vision = ViTConfig.from_hf(CLIP_LARGE if vision is None else vision)
        layers = tuple(layers) if isinstance(layers, list) else (layers,)
        if not all(-vision.num_layers - 1 <= i <= vision.num_layers for i in layers):
            raise MinivlmError(
                f"config.json: vision_feature_layer is {list(layers)}, but a tower of {vision.num_layers} layers has "
                f"hidden states {-vision.num_layers - 1} to {vision.num_layers}"
            )
        return cls(
            text=DecoderConfig.from_hf(config.get("text_config") or {}, tied=is_tied(config)),
            vision=vision,
            image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
            feature_layers=layers,
            drop_class_token=strategy == "default",
            projector_act=config.get("projector_hidden_act", "gelu"),
            projector_bias=config.get("multimodal_projector_bias", True),
            projector_depth=config.get("projector_depth", 2),
        )


def is_tied(config: dict) -> bool:
    """Multimodal configs keep `tie_word_embeddings` outside, inside the text part, or in both places."""
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))


def make_projector(config: LlavaConfig) -> Projector:
    width = config.vision.hidden_size * len(config.feature_layers)
    act = activation(config.projector_act)
    return Projector(width, config.text.hidden_size, act, config.projector_bias, config.projector_depth)


def image_defaults(config: LlavaConfig) -> dict:
    """CLIP's preprocessing at the tower's own size, for what a folder's preprocessor_config.json leaves out."""
    side = config.vision.image_size
    return {**CLIP_DEFAULTS, "size": {"shortest_edge": side}, "crop_size": side}


# ----------------------------------------------------------------------------------------------------------- the model


class Model(BaseModel):
    Config = LlavaConfig

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.multi_modal_projector = make_projector(config)
        self.language_model = Decoder(config.text)

    def encode_images(self, inputs: Inputs) -> Tensor:
        """`pixel_values (I, 3, height, width)` → image tokens `(I · 576, D)`."""
        c = self.config
        features = self.vision_tower(inputs.pixel_values, c.feature_layers, c.drop_class_token)  # (I, 576, 1024)
        return self.multi_modal_projector(features).flatten(0, 1)  # (I · 576, D)

    def embed(self, inputs: Inputs) -> Tensor:
        """Token embeddings `(B, T, D)`, with image tokens in the place of their placeholders."""
        return embed(self, inputs, self.config.image_token_id)


# ------------------------------------------------------------------------------------------------------- the processor


def num_image_tokens(config: LlavaConfig) -> int:
    """Tokens of one picture: (336 / 14)² = 576 at the published size, whatever the picture's own size."""
    return num_features(config.vision, config.drop_class_token)


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = LlavaConfig, TEMPLATE

    @classmethod
    def read_images(cls, folder: Path, config: LlavaConfig) -> ImageConfig:
        return ImageConfig.from_folder(folder, image_defaults(config))

    def see(self, rows: list[Row], images: ImageConfig) -> dict[str, Tensor]:
        for row in rows:
            expand(row, {self.config.image_token_id: [num_image_tokens(self.config)] * len(row.pictures)})
        side = self.config.vision.image_size
        pixels = [of_tower_size(to_pixels(picture, images), side) for row in rows for picture in row.pictures]
        return {"pixel_values": torch.stack(pixels)} if pixels else {}  # (I, 3, 336, 336)
