"""The recipe of the demo models: what the first stage is told to see, and what the second one learns from."""

import json

import numpy as np
import torch

from minivlm.demo import DEMO_CHECKPOINT
from minivlm.demo.draw import CLASS_NAMES, label_map
from minivlm.demo.scene import LONG_SIDE, draw_scene, letter_page
from minivlm.demo.train import (
    PATCH,
    TILE,
    Patches,
    PatchReader,
    Talks,
    classes_of_patches,
    make_folder,
)
from minivlm.models import llava_next
from minivlm.train import initialise

SIGN = CLASS_NAMES.index("sign")  # shapes stand before it, letters behind it


def test_the_shipped_folder_is_what_the_recipe_makes(tmp_path):
    make_folder(tmp_path)
    for file in tmp_path.iterdir():
        assert json.loads(file.read_text()) == json.loads((DEMO_CHECKPOINT / file.name).read_text()), file.name


def test_patch_labels_are_where_the_shapes_are():
    scene = next(s for s in map(draw_scene, range(100)) if (s.height, s.width) == (LONG_SIDE, LONG_SIDE) and s.sign)
    labels = label_map(scene, LONG_SIDE, LONG_SIDE)
    classes = classes_of_patches(labels)  # (5, P, classes)
    side = TILE // PATCH
    for tile, (top, left) in enumerate([(0, 0), (0, TILE), (TILE, 0), (TILE, TILE)], start=1):
        for patch in range(side * side):
            y, x = top + patch // side * PATCH, left + patch % side * PATCH
            counts = np.bincount(labels[y : y + PATCH, x : x + PATCH].ravel(), minlength=len(CLASS_NAMES))
            assert torch.equal(classes[tile, patch], torch.from_numpy(counts >= 0.1 * PATCH * PATCH).float())
    assert classes[0, :, 1:SIGN].any(), "the overview shows shapes, too"


def test_a_page_of_letters_is_covered_with_them():
    for seed in range(4):
        page = letter_page(seed)
        assert len(page.small_print) >= 6 and not page.things and page.sign is None
        letters = classes_of_patches(label_map(page, page.height, page.width))[1:, :, SIGN + 1 :]
        assert letters.any(dim=2).float().mean() > 0.4, "of all patches"


def test_batches_are_functions_of_their_number():
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    processor = llava_next.Processor.from_folder(DEMO_CHECKPOINT, config)
    talks = Talks(processor, num_batches=2, batch_size=2, first_seed=50)
    first, again, second = talks[0], talks[0], talks[1]
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.pixel_values, again.pixel_values)
    assert not torch.equal(first.pixel_values[0], second.pixel_values[0])
    assert (first.labels >= 0).any(dim=1).all()


def test_a_tower_learns_from_its_patches():
    torch.manual_seed(0)
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    processor = llava_next.Processor.from_folder(DEMO_CHECKPOINT, config)
    model = llava_next.Model.from_config(config)
    initialise(model)
    reader = PatchReader(model.vision_tower, config["vision_config"]["hidden_size"])
    batch = Patches(processor.images, 1, 2)[0]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        losses.append(reader.loss(batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
