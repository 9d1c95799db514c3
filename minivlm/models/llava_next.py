"""LLaVA-NeXT, also called LLaVA-1.6 (Liu et al. 2024, https://llava-vl.github.io/blog/2024-01-30-llava-next).

LLaVA-1.5 reads every picture at 336 × 336: small writing is gone before the model sees it. NeXT adds *anyres*: the
picture is also cut into tiles at full resolution, each tile goes through the same tower, and the language model reads
the overview and the tiles.

| | LLaVA-1.5 (`llava.py`) | LLaVA-NeXT |
|---|---|---|
| a picture becomes | 1 square | 1 overview + rows × columns tiles, the grid chosen from `image_grid_pinpoints` |
| tokens | 576, always | 576 + grid without its padding + one `image_newline` per row of patches |
| parameters | – | one vector more, `image_newline` |
| text models | Vicuna | Vicuna, Mistral, Nous-Hermes-2-Yi-34B, Llama-3, Qwen1.5 |

Sections: configuration, the model, the processor.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm.conversation import Row, expand
from minivlm.decoder import Decoder
from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel, embed
from minivlm.image_config import ImageConfig
from minivlm.images import anyres_grid, anyres_tiles, unpadded_grid
from minivlm.inputs import Inputs
from minivlm.models import llava
from minivlm.models.llava import LlavaConfig, image_defaults, make_projector
from minivlm.processor import BaseProcessor
from minivlm.vit import ViT, of_tower_size

KEYS = {**llava.KEYS, "image_newline": ("image_newline", "model.image_newline")}

# For folders without a chat template: llava-v1.6-vicuna's. A system message stands in front as it is.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content[0].text }} "
    "{% else %}{{ message.role | upper }}: "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }} {% endgeneration %}"
    "{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LlavaNextConfig:
    llava: LlavaConfig
    pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels that a picture may be fitted into
    round_unpadding: bool  # how many lines of patches a picture fills: int(round(x, 7)), or int(x) as the originals do

    @classmethod
    def from_hf(cls, config: dict) -> "LlavaNextConfig":
        base = LlavaConfig.from_hf(config)
        if base.vision.class_token and not base.drop_class_token:
            raise MinivlmError("config.json: with a class token, vision_feature_select_strategy must be default")
        default = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # transformers' LlavaNextConfig
        points = tuple(tuple(p) for p in config.get("image_grid_pinpoints") or default)
        return cls(base, points, config.get("round_unpadding", True))


# ----------------------------------------------------------------------------------------------------------- the model


class Model(BaseModel):
    Config = LlavaNextConfig

    def __init__(self, config: LlavaNextConfig):
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.llava.vision)
        self.multi_modal_projector = make_projector(config.llava)
        self.image_newline = nn.Parameter(torch.empty(config.llava.text.hidden_size))
        self.language_model = Decoder(config.llava.text)

    def encode_images(self, inputs: Inputs) -> Tensor:
        """`pixel_values (I, 3, height, width)`, the tiles of one picture after another → image tokens `(N, D)`."""
        c = self.config.llava
        features = self.vision_tower(inputs.pixel_values, c.feature_layers, c.drop_class_token)  # (I, P, channels)
        tiles = self.multi_modal_projector(features)  # (I, P, D)
        grids, sizes = inputs.image_grids.tolist(), inputs.image_sizes.tolist()
        per_picture = tiles.split([1 + rows * columns for rows, columns in grids])
        pictures = zip(per_picture, grids, sizes, strict=True)
        rounding = self.config.round_unpadding
        return torch.cat([arrange(*picture, self.image_newline, rounding) for picture in pictures])

    def embed(self, inputs: Inputs) -> Tensor:
        """Token embeddings `(B, T, D)`, with image tokens in the place of their placeholders."""
        return embed(self, inputs, self.config.llava.image_token_id)


def arrange(
    tiles: Tensor, grid: tuple[int, int], size: tuple[int, int], newline: Tensor, round_first: bool = True
) -> Tensor:
    """The tokens of one picture: the overview, then the tiles read line by line as if they were one picture.

    `tiles (1 + rows · columns, P, D)`, `grid` (rows, columns) of tiles, `size` the picture's own (height, width) in
    pixels, `round_first` the config's `round_unpadding`. The seams between tiles disappear, padding is cut off, and
    every row of patches ends with `newline (D,)`, so that the language model can tell where a line ends, whatever the
    width. Returns `(num_image_tokens, D)`.
    """
    picture = join_tiles(tiles[1:], grid, size, round_first)  # (h, w, D)
    return torch.cat([tiles[0], end_lines(picture, newline)])


def join_tiles(tiles: Tensor, grid: tuple[int, int], size: tuple[int, int], round_first: bool) -> Tensor:
    """`tiles (rows · columns, P, D)` as one picture of patches without its padding: `(h, w, D)`."""
    (rows, columns), D = grid, tiles.shape[-1]
    side = math.isqrt(tiles.shape[1])  # patches along a tile
    picture = tiles.view(rows, columns, side, side, D).transpose(1, 2).reshape(rows * side, columns * side, D)
    top, left, h, w = unpadded_grid(size, (rows * side, columns * side), round_first=round_first)
    return picture[top : top + h, left : left + w]


def end_lines(picture: Tensor, newline: Tensor) -> Tensor:
    """`picture (h, w, D)` line by line, `newline (D,)` behind each: `(h · (w + 1), D)`."""
    return torch.cat([picture, newline.expand(len(picture), 1, -1)], dim=1).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------- the processor


def num_image_tokens(config: LlavaNextConfig, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Tokens of a picture of `size` (height, width) cut into `grid` (rows, columns) tiles: what `arrange` returns."""
    side = config.llava.vision.grid_side
    _, _, h, w = unpadded_grid(size, (grid[0] * side, grid[1] * side), round_first=config.round_unpadding)
    return side * side + h * (w + 1)


class Processor(BaseProcessor):
    """Conversations → `Inputs`."""

    Config, template_source = LlavaNextConfig, TEMPLATE

    @classmethod
    def read_images(cls, folder: Path, config: LlavaNextConfig) -> ImageConfig:
        defaults = image_defaults(config.llava) | {"image_grid_pinpoints": config.pinpoints}
        return ImageConfig.from_folder(folder, defaults)

    def see(self, rows: list[Row], images: ImageConfig) -> dict[str, Tensor]:
        c, tiles, grids = self.config.llava, [], []
        for row in rows:
            sizes = [(picture.height, picture.width) for picture in row.pictures]
            own = [anyres_grid(size, images.image_grid_pinpoints, images.tile) for size in sizes]
            counts = [num_image_tokens(self.config, size, grid) for size, grid in zip(sizes, own, strict=True)]
            expand(row, {c.image_token_id: counts})
            tiles += [of_tower_size(anyres_tiles(p, images), c.vision.image_size) for p in row.pictures]
            grids += own
        return {"pixel_values": torch.cat(tiles), "image_grids": torch.tensor(grids)} if grids else {}
