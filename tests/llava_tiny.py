"""Tiny LLaVA-1.5 checkpoints with their oracle, and conversations."""

import tiny
from tiny import picture, turn
from tokenizers_tiny import TEMPLATES

from minivlm.image_config import CLIP_MEAN, CLIP_STD

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "projector_hidden_act": "gelu",
    "text_config": tiny.TEXTS["llama"], "vision_config": tiny.CLIP, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "torch_dtype": "float16",
}  # fmt: skip
PREPROCESSOR = {
    "crop_size": {"height": 40, "width": 40}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
    "image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 255, "size": {"shortest_edge": 40},
}  # fmt: skip
KINDS = {  # what published files of this kind vary
    "hub": {},
    "several layers": {"vision_feature_layer": [-3, -2, 1]},
    "last layer, with the class token": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    "no bias, relu": {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
    "grouped heads, tied": {
        "text_config": tiny.TEXTS["llama3"] | {"tie_word_embeddings": True}, "tie_word_embeddings": True,
    },
    "siglip, qwen": {
        "vision_config": tiny.SIGLIP | {"image_size": 40}, "vision_feature_select_strategy": "full",
        "text_config": tiny.TEXTS["qwen2"],
    },
    "mistral with a window": {"text_config": tiny.TEXTS["mistral"] | {"sliding_window": 6}},
}  # fmt: skip

TALKS = [
    [turn("user", picture(47, 91), "What is this?")],
    [turn("user", "Hello! No picture here.")],
    [turn("user", picture(40, 40, 1), picture(3, 77, 2), "Compare both."), turn("assistant", "The left one."),
     turn("user", "And now?", picture(200, 41, 3))],
    [turn("user", "Which?", picture(1, 1))],
]  # fmt: skip


def make(folder, kind):
    return tiny.make(folder, CONFIG | KINDS[kind], "llama", TEMPLATES["llava"], PREPROCESSOR)


opened = tiny.opener(make, KINDS)
their_inputs = tiny.their_inputs
