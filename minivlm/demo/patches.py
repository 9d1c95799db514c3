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
from minivlm.demo.scene import (
    COLOURS,
    LETTERS,
    LONG_SIDE,
    PLACES,
    RADII,
    SHAPES,
    TRAIN_SEEDS,
    Scene,
    draw_scene,
    letter_page,
)
from minivlm.image_config import ImageConfig
from minivlm.images import anyres_tiles

TILE, PATCH = 72, 12  # pixels
SIDE = TILE // PATCH  # patches
VIEWS = 5  # of a picture: the overview, then 2 × 2 tiles

NONE = "none"
READINGS = {  # question → answers
    "thing": (NONE, "sign", *(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)),
    "size": (NONE, *RADII),
    "place": (NONE, *(place for row in PLACES for place in row)),  # on the poster, which only the overview shows whole
    "left letter": (NONE, *LETTERS),
    "right letter": (NONE, *LETTERS),
    # The decoder's own positions only count tokens: if a feature forgets its place, nobody can tell where things are.
    "row": tuple(range(SIDE)),
    "column": tuple(range(SIDE)),
    "view": ("overview", "tile"),  # in a tile, the top left is not the picture's
}
QUESTION = {name: i for i, name in enumerate(READINGS)}
UNREADABLE = -100  # nobody could tell; `cross_entropy` leaves it out
NONE_WEIGHT = 0.2  # nearly every patch has the middle of nothing, and that is soon learned


def words_in(name: str, answer: str) -> list[str]:
    """ "red star" → red, star; a place is one word."""
    if answer == NONE:
        return []
    return [answer] if name == "place" else answer.split()


SPOKEN = ("thing", "size", "place", "left letter", "right letter")  # questions whose answers the decoder has words for
WORDS = tuple(dict.fromkeys(word for name in SPOKEN for answer in READINGS[name] for word in words_in(name, answer)))
WORD_SCALE = 2.0  # of a word's score; the smaller, the more of an image token its words are


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
    answers[1:, ..., QUESTION["place"]] = UNREADABLE
    answers[0, ..., QUESTION["left letter"] : QUESTION["right letter"] + 1] = UNREADABLE
    top, left = margins((scene.height, scene.width))
    for y, x, name, place in middles(scene):
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
                if view == 0 and place:
                    patch[QUESTION["place"]] = READINGS["place"].index(place)
            elif view == tile:
                half = "left letter" if column % 1 < 0.5 else "right letter"
                patch[QUESTION[half]] = READINGS[half].index(name)
    return answers.flatten(1, 2)


def words_of_patches(readings: Tensor) -> Tensor:
    """Answers `(I, P, questions)` → float `(I, P, words)`: 1 for every word that an answer about the patch holds."""
    words = torch.zeros(*readings.shape[:2], len(WORDS))
    for name in SPOKEN:
        for i, answer in enumerate(READINGS[name]):
            for word in words_in(name, answer):
                words[..., WORDS.index(word)] += readings[..., QUESTION[name]] == i
    return words.clamp(max=1)


class PatchReader(nn.Module):
    """Linear heads that read every patch from the tower's features `(I, P, width)`."""

    def __init__(self, tower: nn.Module, width: int):
        super().__init__()
        self.tower = tower
        self.cover = nn.Linear(width, len(CLASS_NAMES) + len(COLOURS) + len(SHAPES))
        self.read = nn.ModuleList([nn.Linear(width, len(answers)) for answers in READINGS.values()])

    def features(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels, (-1,), True)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pixels, covers, readings = batch
        return self.loss_of(self.features(pixels), covers, readings)

    def loss_of(self, x: Tensor, covers: Tensor, readings: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(self.cover(x), covers) * covers.shape[-1]
        for head, names, answers in zip(self.read, READINGS.values(), readings.unbind(-1), strict=True):
            weight = torch.ones(len(names))
            weight[0] = NONE_WEIGHT if names[0] == NONE else 1.0
            loss = loss + F.cross_entropy(head(x).flatten(0, 1), answers.flatten(), weight)
        return loss


class TokenReader(PatchReader):
    """The same of image tokens, which is what `projector` makes of the features. They are read as the decoder reads
    them, normalised; and they learn to resemble the words for what they show, so that the decoder can match and say
    these by one rule, and need not learn a new one for each.

    `words (WORDS, D)` are the decoder's embeddings of WORDS.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, words: Tensor):
        super().__init__(tower, words.shape[1])
        self.projector = projector
        self.register_buffer("words", F.normalize(words.detach(), dim=1))
        self.bias = nn.Parameter(torch.full((len(WORDS),), -3.0))  # few words are right

    def features(self, pixels: Tensor) -> Tensor:
        return F.rms_norm(self.projector(super().features(pixels)), self.words.shape[1:])  # (I, P, D)

    def loss_of(self, x: Tensor, covers: Tensor, readings: Tensor) -> Tensor:
        scores = WORD_SCALE * x @ self.words.T + self.bias  # (I, P, words)
        loss = F.binary_cross_entropy_with_logits(scores, words_of_patches(readings)) * len(WORDS)
        return loss + super().loss_of(x, covers, readings)
