"""Tiny Video-LLaVA checkpoints with their oracle, and films for them."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiny
import tokenizers_tiny
import torch
import transformers
from tiny import load, media
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
CONFIGS = {  # what files of this kind may vary
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


class Frames:
    """Stands in for their video processor, which needs torchvision: every frame goes through their image processor.

    That is what transformers itself did before it had video processors. Today's differ by up to two grey levels of 255,
    because they do not resize with Pillow: fixtures/video_llava_videos/.
    """

    def __init__(self, images):
        self.images = images

    def __call__(self, videos, **_):
        films = [self.images(list(film), return_legacy_image_output=False)["pixel_values"] for film in videos]
        return {"pixel_values_videos": torch.tensor(np.stack(films))}  # (films, frames, 3, height, width)


class TheirProcessor(VideoLlavaProcessor):
    """Theirs, which by itself would import torchvision only to see that it is given its own classes."""

    def check_argument_for_proper_class(self, *_):
        pass


def make(folder, config, preprocessor=PREPROCESSOR):
    """A checkpoint in the hub's layout, and its oracle."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<image>", "<video>", "<pad>")])
    tokenizers_tiny.save(tokenizer, folder, "llama", TEMPLATE)
    ids = {f"{kind}_token_index": tokenizer.token_to_id(f"<{kind}>") for kind in ("image", "video")}
    text = config["text_config"] | {"vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64}
    config = ids | config | {"text_config": text}
    theirs = tiny.build(config)
    tiny.save_tensors(tiny.tensors_of(theirs), folder)
    tiny.write_json(folder / "config.json", config)
    tiny.write_json(folder / "preprocessor_config.json", preprocessor)
    images = VideoLlavaImageProcessor(**{key: preprocessor[key] for key in ("size", "crop_size")})
    processor = TheirProcessor(
        images, Frames(images), transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        patch_size=config["vision_config"]["patch_size"], chat_template=TEMPLATE,
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
    )  # fmt: skip
    return tiny.Checkpoint(folder, theirs, processor)


_ROOM = TemporaryDirectory()


def opened(name="hub"):
    """(checkpoint, ours) of one of CONFIGS."""
    return _opened(name)


@cache
def _opened(name):
    checkpoint = make(Path(_ROOM.name, name), CONFIG | CONFIGS[name])
    return checkpoint, load(checkpoint.folder)


# --- conversations ----------------------------------------------------------------------------------------------------


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
