"""The original LLaVA-OneVision repository's checkpoints (lmms-lab/llava-onevision-qwen2-*), with its own processing.

That repository grew out of LLaVA's, and so does this file out of `llava_original.py`:

| | llava-hf's conversion | the original |
|---|---|---|
| config.json | text_config, vision_config | the text model's fields at the top, `mm_*` for the rest |
| tower | 26 layers, of which the last is read | the same, whatever `mm_vision_select_layer` says; its sizes nowhere |
| pinpoints | (height, width) | (width, height); or a string that counts in tiles, "(1x1),...,(6x6)" |
| unpadding | int(round(x, 7)) | int(x): a line fewer where x is 23.999999999999996 |
| a film in the prompt | `<video>` | `<image>`, too; here `<video>`, for the same tokens |
| frames of a film | int(arange(0, n, n / 8)) | linspace(0, n − 1, 8): the first and the last are among them |
| prompt | no system sentence | "You are a helpful assistant." |

Several pictures are padded to squares, one by one, as the original does when it is trained and evaluated.
Source: github.com/LLaVA-VL/LLaVA-NeXT, `siglip_encoder.py`, `mm_utils.py`, `llava_arch.py`, `conversation.py`.
"""

import re
from itertools import product
from pathlib import Path

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.files import read_json
from minivlm.image_config import ImageConfig
from minivlm.models import llava_original
from minivlm.models.llava_onevision import SIGLIP_SO400M, LlavaOnevisionConfig, image_defaults
from minivlm.models.llava_original import CONVERSATIONS, IMAGE, IMAGES, Original, conversation_of, tower_name
from minivlm.text import Tokenizer
from minivlm.vit import ViTConfig

VIDEO = "<video>"
KNOWN_TOWER = "google/siglip-so400m-patch14-384"  # its sizes are SIGLIP_SO400M
FILMS = "{% for part in message.content if part.type == 'video' %}<video>\n{% endfor %}"


def tower_sizes(name: str, folder: Path | None) -> dict:
    """The numbers of the tower without its last layer: from its config.json, else (`folder` None) the known one's."""
    if folder is None:
        return SIGLIP_SO400M
    config = read_json(folder / "config.json")
    if not str(config.get("model_type")).startswith("siglip"):
        raise MinivlmError(f"the vision tower {name} of an original LLaVA-OneVision must be a SigLIP")
    sizes = (config.get("vision_config") or config) | {"model_type": "siglip_vision_model"}
    return sizes | {"num_hidden_layers": ViTConfig.from_hf(sizes).num_layers - 1}


def to_hub(config: dict, vision: dict, image_token_id: int, video_token_id: int) -> dict:
    """As in `llava_original.py`; one setting more that the hub's conversion never needs is `frame_spacing`."""
    usual = {"mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token", "mm_use_im_start_end": False}
    for field, known in usual.items():
        llava_original.check_field(field, config.get(field) or known, (known,))
    points = in_pixels(config.get("image_grid_pinpoints"), ViTConfig.from_hf(vision).image_size)
    as_next = config | {"image_aspect_ratio": "anyres", "image_grid_pinpoints": points, "mm_vision_select_layer": -1}
    return llava_original.to_hub(as_next, vision, image_token_id) | {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "video_token_index": video_token_id,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": config["image_aspect_ratio"],
        "frame_spacing": "linspace",
    }


def in_pixels(points: object, tile: int) -> object:
    """A string of grids as a list of [width, height]; anything else as it is.

    "(1x1),(2x1)" counts in tiles of `tile` pixels; "(1x1),...,(6x6)" are all grids from the first to the last.
    """
    grid = r"\((\d{1,2})x(\d{1,2})\)"
    if not isinstance(points, str) or not re.fullmatch(rf"{grid}(,(\.\.\.,)?{grid})*", points.replace(" ", "")):
        return points
    grids = [(int(columns), int(rows)) for columns, rows in re.findall(grid, points)]
    if "..." in points:
        (left, top), (right, bottom) = grids[0], grids[-1]
        grids = product(range(left, right + 1), range(top, bottom + 1))
    return [[columns * tile, rows * tile] for columns, rows in grids]


def read(folder: Path, config: dict, tower: Path | None) -> Original:
    """`config`: the folder's config.json. `tower`: the vision tower's folder, None for the known one's numbers."""
    tokenizer = Tokenizer.from_folder(folder, extra_tokens=[IMAGE, VIDEO])
    ids = [tokenizer.token_to_id(token) for token in (IMAGE, VIDEO)]
    hub = to_hub(config, tower_sizes(tower_name(config), tower), *ids)
    siglip = {"image_mean": 0.5, "image_std": 0.5}
    images = ImageConfig.from_hf({}, image_defaults(LlavaOnevisionConfig.from_hf(hub)) | siglip)
    template = CONVERSATIONS[conversation_of(config, tokenizer)].replace(IMAGES, IMAGES + FILMS)
    template = ChatTemplate.from_folder(folder, default=template)
    return Original(hub, tokenizer, template, images, llava_original.KEYS)
