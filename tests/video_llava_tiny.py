"""Tiny Video-LLaVA checkpoints with their oracle, and films for them."""

import numpy as np
import tiny
import tokenizers_tiny
import transformers
from tiny import film, media, picture, turn
from tokenizers import AddedToken, Tokenizer
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor

from minivlm.image_config import CLIP_MEAN, CLIP_STD

TOKENIZER = tokenizers_tiny.llama(added=())  # once: two that are trained on the same texts may number them otherwise
CONFIG = {
    "architectures": ["VideoLlavaForConditionalGeneration"], "model_type": "video_llava",
    "text_config": tiny.TEXTS["llama"], "vision_config": tiny.CLIP, "projector_hidden_act": "gelu",
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "bfloat16",
    "ignore_index": -100, "image_seq_length": 25, "video_seq_length": 208,
}  # fmt: skip
PREPROCESSOR = {
    "crop_size": {"height": 40, "width": 40}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
    "image_processor_type": "VideoLlavaImageProcessor", "processor_class": "VideoLlavaProcessor",
    "rescale_factor": 1 / 255, "size": {"shortest_edge": 40},
}  # fmt: skip
KINDS = {  # what files of this kind may vary
    "hub": {},
    "several layers": {"vision_feature_layer": [-3, -2, 1]},
    "last layer, pictures with the class token": {
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    },
    "no bias, relu, grouped heads, tied": {
        "multimodal_projector_bias": False, "projector_hidden_act": "relu", "tie_word_embeddings": True,
        "text_config": tiny.TEXTS["llama3"] | {"tie_word_embeddings": True},
    },
}  # fmt: skip

_EACH = "{%% for part in message['content'] | selectattr('type', 'equalto', '%s') %%}%s{%% endfor %%}"
# What the published one writes: pictures first, then films, then text.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() }}: " + _EACH % ("image", "<image>{{ '\\n' }}")
    + _EACH % ("video", "<video>{{ '\\n' }}") + _EACH % ("text", "{{ part['text'] + ' ' }}") + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)  # fmt: skip


class TheirProcessor(VideoLlavaProcessor):
    """Theirs, which by itself would import torchvision only to see that it is given its own classes."""

    def check_argument_for_proper_class(self, *_):
        pass

    def save_pretrained(self, folder):
        tiny.copy_settings(self.tokenizer.name_or_path, folder)


def make(folder, kind):
    """A checkpoint in the hub's layout, and its oracle."""
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<image>", "<video>", "<pad>")])
    config = tiny.with_ids(CONFIG | KINDS[kind], tokenizer, "image", "video")
    theirs = tiny.build(config)
    tiny.write(folder, config, theirs, preprocessor_config=PREPROCESSOR)
    tokenizers_tiny.save(tokenizer, folder, "llama", TEMPLATE)
    images = VideoLlavaImageProcessor(size=PREPROCESSOR["size"], crop_size=PREPROCESSOR["crop_size"])
    frames = tiny.Frames(images, return_legacy_image_output=False)
    processor = TheirProcessor(
        images, frames, transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        patch_size=config["vision_config"]["patch_size"], chat_template=TEMPLATE,
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
    )  # fmt: skip
    return tiny.Checkpoint(folder, theirs, processor)


opened = tiny.opener(make, KINDS)


# --- conversations ----------------------------------------------------------------------------------------------------

TALKS = [
    [turn("user", picture(47, 91), "What is this?")],
    [turn("user", "Hello! Nothing to see here.")],
    [turn("user", film(8), "What moves?")],
    [turn("user", picture(40, 40, 1), picture(9, 77, 2), "Compare both."), turn("assistant", "The left one."),
     turn("user", "And now?", picture(200, 41, 3))],
    [turn("user", film(8, seed=1), film(8, 20, 15, seed=2), "Which is longer?")],
    [turn("user", film(8, seed=3), "What is in ", picture(33, 57), "and in the film?"), turn("assistant", "A star."),
     turn("user", "And in this one?", picture(41, 39))],
]  # fmt: skip
MORE = [[turn("user", film(3), picture(40, 40), film(1, 40, 40), "Compare.")]]  # than their processor can take


def their_inputs(processor, conversations):
    """What their processor makes of a batch. They take films of one length only."""
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    videos = [np.stack([np.asarray(frame) for frame in film]) for film in media(conversations, "video")]
    return processor(
        text=texts, images=media(conversations, "image") or None, videos=videos or None, padding=True,
        padding_side="left", return_tensors="pt", images_kwargs={"return_legacy_image_output": False},
    )  # fmt: skip


def of_inputs(inputs, num_frames=8):
    """Ours as theirs: films as (films, frames, 3, height, width)."""
    named = {name: value for name, value in vars(inputs).items() if value is not None}
    wanted = ("input_ids", "attention_mask", "pixel_values", "pixel_values_videos")
    theirs = {name: named[name] for name in wanted if name in named}
    if "pixel_values_videos" in theirs:
        theirs["pixel_values_videos"] = theirs["pixel_values_videos"].unflatten(0, (-1, num_frames))
    return theirs
