"""The first stage of the demo's training: what the tower is asked about each of its patches, and the right answers.

CLIP learned to see from captions of 400 million pictures. Here the scene is known, so every patch can be asked
directly. Two kinds of questions: what *covers* the patch (many answers may be right), and READINGS, each with one
answer: what has its middle there, so that a thing is counted once, and which letter stands in which half of the patch,
so that a word can be read in order.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from minivlm.demo.draw import CLASS_NAMES, label_map, middles, render
from minivlm.demo.scene import COLOURS, LETTERS, LONG_SIDE, RADII, SHAPES, TRAIN_SEEDS, Scene, draw_scene, letter_page
from minivlm.image_config import ImageConfig
from minivlm.images import anyres_tiles

TILE, PATCH = 72, 12  # pixels
SIDE = TILE // PATCH  # patches
VIEWS = 5  # of a picture: the overview, then 2 × 2 tiles

READINGS = {  # question → answers; in the first four, 0 is "none"
    "thing": ("none", "sign", *(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)),
    "size": ("none", *RADII),
    "left letter": ("none", *LETTERS),
    "right letter": ("none", *LETTERS),
    # The decoder's own positions only count tokens: if a feature forgets its place, nobody can tell where things are.
    "row": tuple(range(SIDE)),
    "column": tuple(range(SIDE)),
    "view": ("overview", "tile"),  # in a tile, the top left is not the picture's
}
QUESTION = {name: i for i, name in enumerate(READINGS)}
UNREADABLE = -100  # nobody could tell; `cross_entropy` leaves it out


class Patches(Dataset):
    """Batch i: views `(I, 3, height, width)`, what covers their patches `(I, P, classes + colours + shapes)`, and the
    answers to READINGS `(I, P, questions)`."""

    def __init__(self, images: ImageConfig, num_batches: int, batch_size: int):
        self.images, self.num_batches, self.batch_size = images, num_batches, batch_size

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Half posters, half pages of letters: from signs alone, small and rare, reading takes ten times as long."""
        pixels, covers, readings = [], [], []
        for i, seed in enumerate(TRAIN_SEEDS[index * self.batch_size : (index + 1) * self.batch_size]):
            scene = draw_scene(seed) if i % 2 else letter_page(seed)
            views = slice(0 if i % 2 else 1, None)  # nobody can read a page's overview
            pixels.append(anyres_tiles(render(scene, scene.height, scene.width), self.images)[views])
            covers.append(covers_of_patches(label_map(scene, scene.height, scene.width))[views])
            readings.append(readings_of_patches(scene)[views])
        return torch.cat(pixels), torch.cat(covers), torch.cat(readings)


def covers_of_patches(labels: np.ndarray) -> Tensor:
    """Label map (height, width) → `(5, P, classes + colours + shapes)`: 1 where one of them covers a tenth of a patch.

    Colours and shapes also count by themselves: among 35 pairs of them, the shape is a detail that is learned last.
    """
    canvas = Image.fromarray(labels)
    overview = np.array(canvas.resize((TILE, TILE), Image.Resampling.NEAREST))
    top, left = margins(labels.shape)
    canvas = canvas.crop((-left, -top, LONG_SIDE - left, LONG_SIDE - top))
    tiles = np.array(canvas).reshape(2, TILE, 2, TILE).swapaxes(1, 2).reshape(4, TILE, TILE)
    views = torch.from_numpy(np.concatenate([overview[None], tiles])).long()  # (5, TILE, TILE)
    patches = views.view(VIEWS, SIDE, PATCH, SIDE, PATCH).transpose(2, 3).reshape(VIEWS, SIDE * SIDE, PATCH * PATCH)
    counts = torch.zeros(VIEWS, SIDE * SIDE, len(CLASS_NAMES)).scatter_add_(2, patches, torch.ones(patches.shape))
    things = counts[..., 1 : 1 + len(SHAPES) * len(COLOURS)].unflatten(2, (len(SHAPES), len(COLOURS)))
    return (torch.cat([counts, things.sum(2), things.sum(3)], dim=2) >= 0.1 * PATCH * PATCH).float()


def margins(size: tuple[int, int]) -> tuple[int, int]:
    """(above, left of) a poster of `size` (height, width) on the canvas of 2 × 2 tiles, in units."""
    return (LONG_SIDE - size[0]) // 2, (LONG_SIDE - size[1]) // 2


def readings_of_patches(scene: Scene) -> Tensor:
    """`(5, P, questions)` int64: the right answer of every patch to each of READINGS."""
    answers = torch.zeros(VIEWS, SIDE, SIDE, len(READINGS), dtype=torch.int64)
    answers[..., QUESTION["row"]] = torch.arange(SIDE)[:, None]
    answers[..., QUESTION["column"]] = torch.arange(SIDE)
    answers[1:, ..., QUESTION["view"]] = 1
    answers[0, ..., QUESTION["left letter"] : QUESTION["right letter"] + 1] = UNREADABLE  # in the overview
    top, left = margins((scene.height, scene.width))
    for y, x, name in middles(scene):
        canvas_y, canvas_x = y + top, x + left
        tile = 1 + 2 * int(canvas_y >= TILE) + int(canvas_x >= TILE)
        in_tile = tile, canvas_y % TILE / PATCH, canvas_x % TILE / PATCH
        in_overview = 0, y * SIDE / scene.height, x * SIDE / scene.width
        for view, row, column in (in_tile, in_overview):
            patch = answers[view, int(row), int(column)]
            if name not in LETTERS:
                size, _, thing = name.partition(" ")
                patch[QUESTION["thing"]] = READINGS["thing"].index(thing or name)
                patch[QUESTION["size"]] = READINGS["size"].index(size) if thing else 0
            elif view == tile:
                half = "left letter" if column % 1 < 0.5 else "right letter"
                patch[QUESTION[half]] = READINGS[half].index(name)
    return answers.flatten(1, 2)


class PatchReader(nn.Module):
    """Linear heads that read every patch from the tower's features, or from what `projector` makes of them.

    The projector's side is read as the decoder reads it, normalised: else the projector would learn to shout, and an
    image token that drowns what the decoder's layers add to it cannot be told where in a word its letter stands.
    """

    def __init__(self, tower: nn.Module, width: int, projector: nn.Module | None = None):
        super().__init__()
        self.tower, self.projector = tower, projector
        self.cover = nn.Linear(width, len(CLASS_NAMES) + len(COLOURS) + len(SHAPES))
        self.read = nn.ModuleList([nn.Linear(width, len(answers)) for answers in READINGS.values()])

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pixels, covers, readings = batch
        x = self.tower(pixels, (-1,), True)  # (I, P, C)
        if self.projector is not None:
            x = F.rms_norm(self.projector(x), self.read[0].weight.shape[1:])  # (I, P, D)
        loss = F.binary_cross_entropy_with_logits(self.cover(x), covers) * covers.shape[-1]
        for head, answers in zip(self.read, readings.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(head(x).flatten(0, 1), answers.flatten())
        return loss
