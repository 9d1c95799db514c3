"""LLaVA-OneVision (Li et al. 2024, arXiv:2408.03326): one picture, several pictures and films, with one model.

LLaVA-NeXT spends its tokens on one large picture. OneVision spends about as many on whatever it is shown: one picture
in many tiles, several pictures without tiles, or the frames of a film at a quarter of their patches.

| | LLaVA-NeXT (`llava_next.py`) | LLaVA-OneVision |
|---|---|---|
| vision tower | CLIP-L/14 at 336, second-last layer | SigLIP so400m/14 at 384; files lack its last layer |
| patches of a tile | 24 × 24, the class token dropped | 27 × 27, and there is no class token |
| grids | 5, of at most 4 tiles | 36, of at most 6 × 6 tiles |
| a grid of more than about 9 tiles | – | is shrunk to the patches of 9 (`anyres_max_9`) |
| several pictures | each as if alone | each one square: padded, 729 tokens and one newline |
| a film | – | frames of 14 × 14 = 196 tokens, and one newline at the very end |
| text models | Vicuna, Mistral, Yi, Llama-3, Qwen1.5 | Qwen2 of 0.5B (its head is the embedding table), 7B and 72B |

    frame → SigLIP (729, 1152) → projector (729, D) → as a 27 × 27 picture, shrunk to 14 × 14 → (196, D)

Sections: configuration, the model, the processor.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder
from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel, embed
from minivlm.image_config import CLIP_DEFAULTS, ImageConfig, check_film_settings
from minivlm.images import anyres_grid, anyres_tiles, resize, resized_size, to_pixels, unpadded_grid
from minivlm.inputs import Inputs
from minivlm.models import llava_next
from minivlm.models.llava import LlavaConfig, make_projector
from minivlm.models.llava_next import end_lines, join_tiles
from minivlm.processor import BaseProcessor
from minivlm.videos import FILM_OPTIONS, FilmRule, open_video
from minivlm.vit import ViT, of_tower_size

KEYS = llava_next.KEYS

# The tower of a config.json without a `vision_config`. Source: transformers' LlavaOnevisionConfig.
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,  # of the 27 that SigLIP was trained with
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

# Every grid of up to 6 × 6 tiles: transformers' default, and what all published checkpoints say.
PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

AT_ONCE = 16  # tiles or frames in the tower: 48 would need another gigabyte for what the layers pass on

# For folders without a chat template: the published one. Pictures first, then films, then text; no system sentence.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}<video>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ '\\n' + part.text }}{% endgeneration %}"
    "{% else %}{{ '\\n' + part.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LlavaOnevisionConfig:
    llava: LlavaConfig
    video_token_id: int
    pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels that a picture may be fitted into
    max_tiles: int  # a grid with more patches than so many tiles have is shrunk: the 9 of `anyres_max_9`
    round_unpadding: bool  # as in llava_next.py
    frame_spacing: str  # how a film's frames are chosen, see videos.py; the originals do it otherwise

    @classmethod
    def from_hf(cls, config: dict) -> "LlavaOnevisionConfig":
        vision = config.get("vision_config")
        parts = {
            "text_config": {"model_type": "qwen2"} | (config.get("text_config") or {}),
            "vision_config": SIGLIP_SO400M if vision is None else {"model_type": "siglip_vision_model"} | vision,
        }
        defaults = {
            "image_token_index": config.get("image_token_id", 151646),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }
        base = LlavaConfig.from_hf(defaults | config | parts)
        if base.vision.class_token != base.drop_class_token:
            raise MinivlmError(
                "config.json: vision_feature_select_strategy must be full for a tower without a class token, such as "
                "SigLIP, and default for one with it"
            )
        return cls(
            llava=base,
            video_token_id=config.get("video_token_index", config.get("video_token_id", 151647)),
            pinpoints=tuple(tuple(p) for p in config.get("image_grid_pinpoints") or PINPOINTS),
            max_tiles=max_tiles(config.get("vision_aspect_ratio", "anyres_max_9")),
            round_unpadding=config.get("round_unpadding", True),
            frame_spacing=config.get("frame_spacing", "arange"),
        )


def max_tiles(aspect_ratio: str) -> int:
    """9 of `anyres_max_9`."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    if found is None:
        raise MinivlmError(f"config.json: vision_aspect_ratio is {aspect_ratio!r}, not anyres_max_ and a number")
    return int(found[1])


def image_defaults(config: LlavaOnevisionConfig) -> dict:
    """For what a folder's preprocessor_config.json leaves out: the whole picture, squashed to the tower's square.

    Trap: transformers' LlavaOnevisionImageProcessor has the mean and std of CLIP here; the published files have
    SigLIP's, 0.5 for all.
    """
    square = {"height": config.llava.vision.image_size, "width": config.llava.vision.image_size}
    whole = {"size": square, "do_center_crop": False, "crop_size": None}
    return {**CLIP_DEFAULTS, **whole, "image_grid_pinpoints": config.pinpoints}


# ----------------------------------------------------------------------------------------------------------- the model


class Model(BaseModel):
    Config = LlavaOnevisionConfig

    def __init__(self, config: LlavaOnevisionConfig):
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.llava.vision)
        self.multi_modal_projector = make_projector(config.llava)
        self.image_newline = nn.Parameter(torch.empty(config.llava.text.hidden_size))
        self.language_model = Decoder(config.llava.text)

    def look(self, pixels: Tensor) -> Tensor:
        """`pixels (I, 3, height, width)` of tiles or frames → their patches, projected: `(I, P, D)`."""
        c = self.config.llava
        some = [self.vision_tower(x, c.feature_layers, c.drop_class_token) for x in pixels.split(AT_ONCE)]
        return self.multi_modal_projector(torch.cat(some))

    def encode_images(self, inputs: Inputs) -> Tensor:
        """`pixel_values (I, 3, height, width)`, the tiles of one picture after another → image tokens `(N, D)`."""
        grids, sizes = inputs.image_grids.tolist(), inputs.image_sizes.tolist()
        per_picture = self.look(inputs.pixel_values).split([1 + rows * columns for rows, columns in grids])
        pictures = zip(per_picture, grids, sizes, strict=True)
        return torch.cat([arrange(*picture, self.image_newline, self.config) for picture in pictures])

    def encode_videos(self, inputs: Inputs) -> Tensor:
        """`pixel_values_videos (I, 3, height, width)`, the frames of one film after another → film tokens `(N, D)`."""
        frames = pool(self.look(inputs.pixel_values_videos))  # (I, 196, D)
        films = frames.split(inputs.video_sizes.tolist())
        return torch.cat([torch.cat([film.flatten(0, 1), self.image_newline[None]]) for film in films])

    def embed(self, inputs: Inputs) -> Tensor:
        """Token embeddings `(B, T, D)`, with the tokens of pictures and films in the places of their placeholders."""
        return embed(self, inputs, self.config.llava.image_token_id, self.config.video_token_id)


def arrange(
    tiles: Tensor, grid: tuple[int, int], size: tuple[int, int], newline: Tensor, config: LlavaOnevisionConfig
) -> Tensor:
    """The tokens of one picture: the overview, then the tiles read line by line, shrunk if they are many.

    `tiles (1 + rows · columns, P, D)`, `grid` (rows, columns) of tiles, `size` the picture's own (height, width) in
    pixels. A picture among several has no tiles, grid (0, 0): its one `newline (D,)` follows the overview. Returns
    `(num_image_tokens, D)`.
    """
    overview = tiles[0]
    if not any(grid):
        return torch.cat([overview, newline[None]])
    picture = join_tiles(tiles[1:], grid, size, config.round_unpadding)  # (h, w, D)
    picture = shrink(picture[None], shrunk_size(picture.shape[:2], len(overview), config.max_tiles))[0]
    return torch.cat([overview, end_lines(picture, newline)])


def shrunk_size(size: tuple[int, int], patches: int, max_tiles: int) -> tuple[int, int]:
    """(h, w) of a picture of `size` (h, w) patches with at most about as many as `max_tiles` tiles of `patches` have.

    Nothing is shrunk up to 1.1 times the side that those would fill, which is 1.21 times their patches.
    """
    h, w = size
    ratio = math.sqrt(h * w / (max_tiles * patches))
    return (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)


def pool(frames: Tensor) -> Tensor:
    """Patches of frames `(I, P, D)` → a quarter of them `(I, 196, D)`: ceil(27 / 2) = 14 along a side.

    Trap: an average over 2 × 2 patches would lose the last row and column, and give 13 × 13.
    """
    I, P, D = frames.shape
    side = math.isqrt(P)
    half = math.ceil(side / 2)
    return shrink(frames.view(I, side, side, D), (half, half)).flatten(1, 2)


def shrink(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """`pictures (I, h, w, D)` bilinearly to `size` (h, w): every point from four neighbours, without antialiasing."""
    if pictures.shape[1:3] == size:
        return pictures
    return F.interpolate(pictures.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------- the processor


def num_image_tokens(config: LlavaOnevisionConfig, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Tokens of a picture of `size` (height, width) cut into `grid` (rows, columns) tiles: what `arrange` returns."""
    side = config.llava.vision.grid_side
    if not any(grid):
        return side**2 + 1
    _, _, h, w = unpadded_grid(size, (grid[0] * side, grid[1] * side), round_first=config.round_unpadding)
    h, w = shrunk_size((h, w), side**2, config.max_tiles)
    return side**2 + h * (w + 1)


def num_video_tokens(config: LlavaOnevisionConfig, num_frames: int) -> int:
    """Tokens of a film: 196 for each frame at the published size, and one newline."""
    return num_frames * math.ceil(config.llava.vision.grid_side / 2) ** 2 + 1


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = LlavaOnevisionConfig, TEMPLATE
    film_options = FILM_OPTIONS

    @classmethod
    def read_images(cls, folder: Path, config: LlavaOnevisionConfig) -> ImageConfig:
        images = ImageConfig.from_folder(folder, image_defaults(config))
        check_film_settings(folder, images)
        return images

    def see(self, rows: list[Row], images: ImageConfig) -> dict[str, Tensor]:
        c, rule = self.config, FilmRule(spacing=self.config.frame_spacing)
        pictures, films = [], []  # (tiles, grid) each; frames each
        for row in rows:
            own = tiles_of(row.pictures, images)
            own_films = [frames_of(film, options, rule, images) for film, options in row.films]
            sizes = [(picture.height, picture.width) for picture in row.pictures]
            counts = [num_image_tokens(c, size, grid) for size, (_, grid) in zip(sizes, own, strict=True)]
            film_counts = [num_video_tokens(c, len(frames)) for frames in own_films]
            expand(row, {c.llava.image_token_id: counts, c.video_token_id: film_counts})
            pictures += own
            films += own_films
        side, tensors = c.llava.vision.image_size, {}
        if pictures:
            tensors["pixel_values"] = torch.cat([of_tower_size(tiles, side) for tiles, _ in pictures])
            tensors["image_grids"] = torch.tensor([grid for _, grid in pictures])
        if films:
            tensors["pixel_values_videos"] = torch.cat([of_tower_size(frames, side) for frames in films])
            tensors["video_sizes"] = torch.tensor([len(frames) for frames in films])
        return tensors


def tiles_of(pictures: list[Image.Image], images: ImageConfig) -> list[tuple[Tensor, tuple[int, int]]]:
    """Tiles `(1 + rows · columns, 3, tile, tile)` and grid (rows, columns) of each picture of one conversation.

    One picture is squashed to a square and cut into tiles, as in LLaVA-NeXT. Of several, wherever they stand, each is
    padded to a square instead, and has no grid, (0, 0): the model was trained so.
    """
    if len(pictures) == 1:
        size = pictures[0].height, pictures[0].width
        return [(anyres_tiles(pictures[0], images), anyres_grid(size, images.image_grid_pinpoints, images.tile))]
    square = replace(images, do_pad=True)
    return [(to_pixels(picture, square)[None], (0, 0)) for picture in pictures]


def frames_of(film: object, options: dict, rule: FilmRule, images: ImageConfig) -> Tensor:
    """Pixels `(frames, 3, height, width)` of a film: every frame squashed to a square, as soon as it is decoded."""

    def squash(frame: Image.Image, _: int) -> Image.Image:
        size = resized_size((frame.height, frame.width), images.size)
        return resize(frame, size, images.resample) if images.do_resize else frame

    return torch.stack([to_pixels(frame, images) for frame in open_video(film, options, rule, squash).frames])
