"""Video-LLaVA (Lin et al. 2023, "Learning United Visual Representation by Alignment Before Projection",
arXiv:2311.10122).

LLaVA-1.5 that also watches films, with hardly anything new: a film is 8 frames, a frame is a picture, and a language
model reads frame after frame as it reads words. What makes one projector enough for both is the towers: LanguageBind
trained the two so that a picture and a film of the same thing lie close together, *before* any projector saw them.

| | LLaVA-1.5 (`llava.py`) | Video-LLaVA |
|---|---|---|
| towers | one CLIP-L/14 at 336 pixels | two at 224, of one shape: one for pictures, one for frames |
| placeholders | `<image>` | `<image>` and `<video>` |
| a picture | (336 / 14)² = 576 tokens | (224 / 14)² = 256 |
| a film | – | a frame has 256 tokens and the class token, in front: 8 · 257 = 2056 |

    pictures → image tower, second-last layer, without class token → (256, 1024) ┐
                                                                                 ├→ projector → decoder
    frames   → video tower, second-last layer, with class token    → (257, 1024) ┘

That frames keep their class token is how the model was trained, whatever `vision_feature_select_strategy` says, which
speaks of pictures. Nothing tells frames apart but their order; no layer mixes them before the decoder.

Sections: configuration, the model, the processor.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minivlm.console import note_once
from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder
from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel, embed
from minivlm.image_config import ImageConfig, check_film_settings
from minivlm.images import MAX_RESIZED_PIXELS, expand_to_square, mean_colour, resized_size, to_pixels
from minivlm.inputs import Inputs
from minivlm.models import llava
from minivlm.models.llava import CLIP_LARGE, LlavaConfig, image_defaults, make_projector
from minivlm.processor import BaseProcessor
from minivlm.videos import FILM_OPTIONS, FilmRule, open_video
from minivlm.vit import ViT, num_features, of_tower_size

KEYS = {
    "language_model": llava.KEYS["language_model"],
    "language_model.lm_head": llava.KEYS["language_model.lm_head"],
    "image_tower": (
        "image_tower.vision_model",
        "image_tower",
        "model.image_tower.vision_model",
        "model.image_tower",
    ),
    "video_tower": (
        "video_tower.vision_model",
        "video_tower",
        "model.video_tower.vision_model",
        "model.video_tower",
    ),
    "multi_modal_projector": llava.KEYS["multi_modal_projector"],
}

# The towers of a config.json without a `vision_config`. Source: transformers' VideoLlavaConfig.
TOWER = CLIP_LARGE | {"image_size": 224}

NUM_FRAMES = 8  # of every film that the published model has seen

# For folders without a chat template: pictures first, then films, then text; a system message stands as it is.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content[0].text }}"
    "{% else %}{{ message.role | upper }}: "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}<video>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }} {% endgeneration %}"
    "{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class VideoLlavaConfig:
    llava: LlavaConfig  # `drop_class_token` concerns pictures alone
    video_token_id: int
    # Both are otherwise in the original repository, see video_llava_original.py:
    frame_spacing: str  # how a film's frames are chosen, see videos.py
    antialias: bool  # whether shrinking looks at every pixel, as Pillow does

    @classmethod
    def from_hf(cls, config: dict) -> "VideoLlavaConfig":
        vision = config.get("vision_config")
        base = LlavaConfig.from_hf(config | {"vision_config": TOWER if vision is None else vision})
        video_token_id = config.get("video_token_index", config.get("video_token_id", 32001))
        return cls(base, video_token_id, config.get("frame_spacing", "arange"), config.get("antialias", True))


# ----------------------------------------------------------------------------------------------------------- the model


class Model(BaseModel):
    Config = VideoLlavaConfig

    def __init__(self, config: VideoLlavaConfig):
        super().__init__()
        self.config = config
        self.image_tower = ViT(config.llava.vision)
        self.video_tower = ViT(config.llava.vision)
        self.multi_modal_projector = make_projector(config.llava)
        self.language_model = Decoder(config.llava.text)

    def encode_images(self, inputs: Inputs) -> Tensor:
        """`pixel_values (I, 3, height, width)` → tokens of the pictures `(I · 256, D)`."""
        c = self.config.llava
        features = self.image_tower(inputs.pixel_values, c.feature_layers, c.drop_class_token)  # (I, 256, 1024)
        return self.multi_modal_projector(features).flatten(0, 1)  # (I · 256, D)

    def encode_videos(self, inputs: Inputs) -> Tensor:
        """`pixel_values_videos (I, 3, height, width)`, the frames of one film after another → `(I · 257, D)`."""
        layers = self.config.llava.feature_layers
        features = self.video_tower(inputs.pixel_values_videos, layers, drop_class_token=False)  # (I, 257, 1024)
        return self.multi_modal_projector(features).flatten(0, 1)  # (I · 257, D)

    def embed(self, inputs: Inputs) -> Tensor:
        """Token embeddings `(B, T, D)`, with the tokens of pictures and films in the places of their placeholders."""
        return embed(self, inputs, self.config.llava.image_token_id, self.config.video_token_id)


# ------------------------------------------------------------------------------------------------------- the processor


def num_image_tokens(config: VideoLlavaConfig) -> int:
    """Tokens of one picture: 256 at the published size, whatever the picture's own size."""
    return num_features(config.llava.vision, config.llava.drop_class_token)


def num_video_tokens(config: VideoLlavaConfig, num_frames: int) -> int:
    """Tokens of one film: 257 for each frame at the published size."""
    return num_frames * num_features(config.llava.vision, drop_class_token=False)


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = VideoLlavaConfig, TEMPLATE
    film_options = FILM_OPTIONS

    @classmethod
    def read_images(cls, folder: Path, config: VideoLlavaConfig) -> ImageConfig:
        images = ImageConfig.from_folder(folder, image_defaults(config.llava))
        check_film_settings(folder, images)
        return images

    def override(self, images_kwargs: dict) -> ImageConfig:
        if images_kwargs and not self.config.antialias:
            raise MinivlmError("a checkpoint of the original Video-LLaVA takes no image settings but its own")
        return self.images.override(images_kwargs)

    def see(self, rows: list[Row], images: ImageConfig) -> dict[str, Tensor]:
        c, tensors = self.config, {}
        rule = FilmRule(num_frames=NUM_FRAMES, spacing=c.frame_spacing)
        bare = replace(images, do_pad=False)  # frames are shown as pictures are, but never padded to a square
        films = []  # (frames, 3, 224, 224) each
        for row in rows:
            shown = (open_video(film, options, rule).frames for film, options in row.films)
            own = [self.look(frames, bare, "bilinear") for frames in shown]
            counts = [num_image_tokens(c)] * len(row.pictures)
            film_counts = [num_video_tokens(c, len(film)) for film in own]
            expand(row, {c.llava.image_token_id: counts, c.video_token_id: film_counts})
            films += own
        pictures = [picture for row in rows for picture in row.pictures]
        if pictures:
            tensors["pixel_values"] = self.look(pictures, images, "bicubic")  # (I, 3, 224, 224)
        if films:
            tensors["pixel_values_videos"] = torch.cat(films)  # (I, 3, 224, 224)
            tensors["video_sizes"] = torch.tensor([len(film) for film in films])
            if any(len(film) != NUM_FRAMES for film in films):
                note_once(f"Video-LLaVA learned from films of {NUM_FRAMES} frames; of others it may understand less")
        return tensors

    def look(self, pictures: list[Image.Image], images: ImageConfig, original_filter: str) -> Tensor:
        """→ `(I, 3, height, width)`. In a picture of 1 or 3 rows, transformers takes these for colours; we do not. It
        resizes frames with torchvision, which differs from Pillow by up to two grey levels."""
        if self.config.antialias:
            pixels = [to_pixels(picture, images) for picture in pictures]
        else:
            pixels = [original_pixels(picture, images, original_filter) for picture in pictures]
        return of_tower_size(torch.stack(pixels), self.config.llava.vision.image_size)


def original_pixels(picture: Image.Image, images: ImageConfig, filter: str) -> Tensor:
    """As the original repository makes them: `(3, height, width)` float32 of an RGB picture.

    It resizes floats, and a pixel of the result comes from the 4 nearest pixels ("bilinear", its frames) or 16
    ("bicubic", its pictures), however many there are: shrunk pictures are rough, and the model has learned from such.
    Of the crop's odd remainder, half is rounded to even, which may be a pixel beside `center_crop`.
    """
    if images.do_pad:
        picture = expand_to_square(picture, mean_colour(images))
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1) * images.rescale_factor
    size = resized_size((picture.height, picture.width), images.size)
    if math.prod(size) > MAX_RESIZED_PIXELS:
        raise MinivlmError(f"a picture of {picture.height} x {picture.width} pixels is too long: crop it first")
    x = F.interpolate(x[None], size, mode=filter, align_corners=False)[0]  # (3, resized height, resized width)
    top, left = (round((now - side) / 2) for now, side in zip(size, images.crop_size, strict=True))
    x = x[:, top : top + images.crop_size[0], left : left + images.crop_size[1]]
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    return (x - mean) / std
