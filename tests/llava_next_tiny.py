"""Tiny LLaVA-NeXT checkpoints with each of its text models, their oracle, and conversations."""

import tiny
from tiny import picture, turn
from tokenizers_tiny import TEMPLATES

from minivlm.image_config import CLIP_MEAN, CLIP_STD

# Wide and tall are not alike here, so that (height, width) taken for (width, height) shows.
PINPOINTS = [[40, 80], [80, 80], [120, 40], [40, 160]]
CONFIG = {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "projector_hidden_act": "gelu",
    "image_grid_pinpoints": PINPOINTS, "vision_config": tiny.CLIP, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "use_image_newline_parameter": True, "torch_dtype": "float16",
}  # fmt: skip
PREPROCESSOR = {
    "aspect_ratio_setting": "anyres", "crop_size": {"height": 40, "width": 40}, "do_center_crop": True,
    "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
    "image_grid_pinpoints": PINPOINTS, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
    "image_processor_type": "LlavaNextImageProcessor", "rescale_factor": 1 / 255, "size": {"shortest_edge": 40},
}  # fmt: skip
KINDS = {  # the text model, its tokenizer's style, its template, what else is in config.json
    "vicuna": ("llama", "llama", TEMPLATES["llava"], {}),
    "mistral": ("mistral", "llama", TEMPLATES["mistral"], {}),
    "mistral with a window": ("mistral", "llama", TEMPLATES["mistral"], {"text_config": {"sliding_window": 11}}),
    "qwen": ("qwen2", "qwen2", TEMPLATES["onevision"], {"vision_feature_layer": [-2, 1]}),
    "qwen with a window": (
        "qwen2", "qwen2", TEMPLATES["onevision"],
        {"text_config": {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}},
    ),
    "llama 3": (
        "llama3", "llama3", TEMPLATES["mllama"].replace("<|image|>", "<image>"), {"multimodal_projector_bias": False},
    ),
}  # fmt: skip

TALKS = [
    [turn("user", picture(47, 191), "What is this?")],
    [turn("user", "Hello! No picture here.")],
    [turn("user", picture(40, 40, 1), picture(230, 77, 2), "Compare both."), turn("assistant", "The left one."),
     turn("user", picture(100, 101, 3), "And now?")],
    [turn("user", picture(1, 1), "Which?")],
]  # fmt: skip


def make(folder, kind):
    text, style, template, more = KINDS[kind]
    config = CONFIG | more | {"text_config": tiny.TEXTS[text] | more.get("text_config", {})}
    return tiny.make(folder, config, style, template, PREPROCESSOR)


opened = tiny.opener(make, KINDS)
their_inputs = tiny.their_inputs
