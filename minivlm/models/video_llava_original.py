"""The checkpoints of the original Video-LLaVA repository (LanguageBind/Video-LLaVA-7B), with its own processing.

That repository grew out of LLaVA's, and so does this file out of `llava_original.py`:

| | LanguageBind's conversion | the original |
|---|---|---|
| config.json | text_config, vision_config | the text model's fields at the top, `mm_*` for the rest |
| towers | their sizes in config.json | inside, but their sizes where `mm_image_tower` and `mm_video_tower` are |
| a film in the prompt | `<video>` and a newline | 8 × `<image>`; here `<video>`, for the same tokens |
| more than one in a turn | pictures first, then films, each with a newline | as given, one newline behind them all |
| prompt | no system sentence, no </s> | both |
| a picture | its middle square | all of it, padded to a square with the mean colour |
| resizing | Pillow's, which looks at every pixel | floats, from the nearest pixels alone: `original_pixels` |
| frames of a film | int(arange(0, n, n / 8)) | linspace(0, n − 1, 8): the first and the last are among them |

Does not: turn half of all films into their mirror images by chance, as the original does even when it only answers.
Source: github.com/PKU-YuanGroup/Video-LLaVA, `llava_arch.py`, `languagebind/*/processing_*.py`, `serve/cli.py`.
"""

from pathlib import Path

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.files import read_json
from minivlm.image_config import ImageConfig
from minivlm.models import llava_original
from minivlm.models.llava import image_defaults
from minivlm.models.llava_original import CONVERSATIONS, IMAGE, IMAGES, Original, check_field, to_hub
from minivlm.models.video_llava import VideoLlavaConfig
from minivlm.text import Tokenizer
from minivlm.vit import ViTConfig

VIDEO = "<video>"

KEYS = {
    "language_model": ("model",),
    "language_model.lm_head": ("lm_head",),
    "image_tower": ("model.image_tower.image_tower",),
    "video_tower": ("model.video_tower.video_tower",),
    "multi_modal_projector.linear_1": llava_original.KEYS["multi_modal_projector.linear_1"],
    "multi_modal_projector.linear_2": llava_original.KEYS["multi_modal_projector.linear_2"],
}

SEEN = (
    "{% for part in message.content if part.type != 'text' %}"
    "{% if part.type == 'image' %}<image>{% else %}<video>{% endif %}"
    "{% if loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
TEMPLATE = CONVERSATIONS["vicuna_v1"].replace(IMAGES, SEEN)


def tower_names(config: dict) -> list[str]:
    """Hub ids or folders of the image tower and the video tower; only their config.json is read."""
    names = [config.get(key) for key in ("mm_image_tower", "mm_video_tower")]
    if not all(isinstance(name, str) and name for name in names):
        raise MinivlmError(f"config.json: mm_image_tower and mm_video_tower must name the two towers, not {names}")
    return names


def tower_sizes(folders: list[Path]) -> dict:
    """The numbers of the two towers, which must be alike."""
    configs = [read_json(folder / "config.json") for folder in folders]
    towers = [(config.get("vision_config") or config) | {"model_type": "clip_vision_model"} for config in configs]
    if ViTConfig.from_hf(towers[0]) != ViTConfig.from_hf(towers[1]):
        raise MinivlmError(f"the vision towers in {folders[0]} and {folders[1]} are not of one shape")
    return towers[0]


def read(folder: Path, config: dict, towers: list[Path]) -> Original:
    """`config`: the folder's config.json. `towers`: the folders of the image tower and the video tower."""
    check_field("image_aspect_ratio", config.get("image_aspect_ratio") or "square", ("pad", "square"))
    check_field("mm_use_im_start_end", config.get("mm_use_im_start_end") or False, (False,))
    tokenizer = Tokenizer.from_folder(folder, extra_tokens=[IMAGE, VIDEO])
    hub = to_hub(config, tower_sizes(towers), tokenizer.token_to_id(IMAGE)) | {
        "architectures": ["VideoLlavaForConditionalGeneration"],
        "model_type": "video_llava",
        "video_token_index": tokenizer.token_to_id(VIDEO),
        "frame_spacing": "linspace",
        "antialias": False,
    }
    ours = {"do_pad": config.get("image_aspect_ratio") == "pad"}
    images = ImageConfig.from_hf({}, image_defaults(VideoLlavaConfig.from_hf(hub).llava), ours)
    return Original(hub, tokenizer, ChatTemplate.from_folder(folder, default=TEMPLATE), images, KEYS)
