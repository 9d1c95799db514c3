"""Tiny LLaVA-OneVision checkpoints with their oracle, and films for them."""

import numpy as np
import tiny
import tokenizers_tiny
import transformers
from tiny import film, media, picture, turn
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

# 43 pixels a tile, 5 patches a side: an odd number, as the published 27.
PINPOINTS = [[43 * rows, 43 * columns] for rows in range(1, 7) for columns in range(1, 7)]
CONFIG = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
    "projector_hidden_act": "gelu", "image_grid_pinpoints": PINPOINTS, "vision_config": tiny.SIGLIP,
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    "use_image_newline_parameter": True, "torch_dtype": "float16", "ignore_index": -100,
}  # fmt: skip
QWEN = tiny.TEXTS["qwen2"] | {"use_sliding_window": False}
KINDS = {  # what the published files vary, and what they might
    "0.5b": {"tie_word_embeddings": True, "text_config": QWEN | {"tie_word_embeddings": True}},
    "7b": {"tie_word_embeddings": False, "text_config": QWEN},
    "several layers, other numbers": {
        "vision_feature_layer": [-2, -1], "vision_aspect_ratio": "anyres_max_3", "multimodal_projector_bias": False,
        "projector_hidden_act": "relu", "text_config": QWEN,
    },
}  # fmt: skip
# Not 0.5 for all three, as published: another number for each colour shows more.
PIXELS = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
    "image_mean": [0.5, 0.45, 0.4], "image_std": [0.5, 0.6, 0.4], "rescale_factor": 1 / 255,
    "size": {"height": 43, "width": 43},
}  # fmt: skip
PREPROCESSOR = PIXELS | {
    "do_pad": True, "image_grid_pinpoints": PINPOINTS, "image_processor_type": "LlavaOnevisionImageProcessor",
    "processor_class": "LlavaOnevisionProcessor",
}  # fmt: skip
VIDEO_PREPROCESSOR = PIXELS | {
    "processor_class": "LlavaOnevisionProcessor", "video_processor_type": "LlavaOnevisionVideoProcessor"
}  # fmt: skip
TEMPLATE = tokenizers_tiny.TEMPLATES["onevision"]


class TheirProcessor(LlavaOnevisionProcessor):
    """Theirs, which by itself would import torchvision only to see that it is given its own classes."""

    def check_argument_for_proper_class(self, *_):
        pass

    def save_pretrained(self, folder):
        """As transformers 5 writes it: all settings in one file."""
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        films = VIDEO_PREPROCESSOR | {"do_sample_frames": False, "return_metadata": False}
        settings = {"image_processor": self.image_processor.to_dict(), "video_processor": films}
        tiny.write_json(folder / "processor_config.json", settings)


def make(folder, kind):
    """A checkpoint in the hub's layout, and its oracle."""
    tokenizer = tokenizers_tiny.qwen2(added=("<image>", "<video>"))
    config = tiny.with_ids(CONFIG | KINDS[kind], tokenizer, "image", "video")
    theirs = tiny.build(config)
    counts = {
        "num_image_tokens": 25, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": config["vision_aspect_ratio"],
    }  # fmt: skip
    tiny.write(
        folder, config, theirs, preprocessor_config=PREPROCESSOR, processor_config=counts,
        video_preprocessor_config=VIDEO_PREPROCESSOR,
    )  # fmt: skip
    tokenizers_tiny.save(tokenizer, folder, "qwen2", TEMPLATE)
    images = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    frames = tiny.Frames(SiglipImageProcessorPil(**PIXELS))
    processor = TheirProcessor(images, tokens, frames, chat_template=TEMPLATE, **counts)
    return tiny.Checkpoint(folder, theirs, processor)


opened = tiny.opener(make, KINDS)


# --- conversations ----------------------------------------------------------------------------------------------------

# A large picture, which is shrunk; text; pictures in one turn and over turns; a film with a picture; two films.
TALKS = [
    [turn("user", picture(200, 230), "What is this?")],
    [turn("user", "Hello! No picture here.")],
    [turn("user", picture(40, 40, 1), picture(130, 77, 2), "Compare both."), turn("assistant", "The left one."),
     turn("user", picture(7, 9, 3), "And now?")],
    [turn("user", picture(47, 91), film(2), "What happens?")],
    [turn("user", film(2, 43, 43, 1), film(2, 60, 30, 2), "Which is longer?"), turn("assistant", "Neither.")],
]  # fmt: skip
MORE = [  # than their processor can take: films of different lengths
    [turn("user", film(7), "Long?")],
    [turn("user", film(1), film(3, 20, 20), picture(9, 99), "Now?")],
]


def their_inputs(processor, conversations):
    """What their processor makes of a batch, nested as `apply_chat_template` does it. Films of one length only."""
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    images = [media([c], "image") for c in conversations]
    videos = [np.stack([np.asarray(frame) for frame in film]) for film in media(conversations, "video")]
    return processor(
        text=texts, images=images if any(images) else None, videos=videos or None, padding=True, padding_side="left",
        return_tensors="pt",
    )  # fmt: skip


# --- what the fixture holds -------------------------------------------------------------------------------------------

STORED = {
    **{f"{n} frames": [[turn("user", film(n, *size), "What?")]] for n, size in
       {1: (47, 91), 5: (60, 40), 8: (43, 43), 13: (97, 64), 24: (30, 25)}.items()},
    "two films": [[turn("user", film(5, 30, 50, 1), film(5, 30, 50, 2), "Both?")]],
    "batch": [
        [turn("user", picture(100, 300), film(3, 43, 43), "And?")], [turn("user", "Hi")],
        [turn("user", film(3, 43, 43, 1), "Where?"), turn("assistant", "Here."),
         turn("user", film(3, 43, 43, 2), "So?")],
        [turn("user", picture(60, 40), "A picture."), turn("assistant", "Yes."), turn("user", picture(9, 9), "Both?")],
    ],
}  # fmt: skip
