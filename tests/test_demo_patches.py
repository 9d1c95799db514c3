"""The first stage's questions: their answers are what the picture shows, and a tower learns from them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minivlm.demo import DEMO_CHECKPOINT
from minivlm.demo.draw import CLASS_NAMES, label_map, middles
from minivlm.demo.patches import (
    PATCH,
    QUESTION,
    READINGS,
    SIDE,
    TILE,
    UNREADABLE,
    WORDS,
    Patches,
    PatchReader,
    TokenReader,
    covers_of_patches,
    readings_of_patches,
    words_of_patches,
)
from minivlm.demo.scene import COLOURS, LETTERS, LONG_SIDE, SHAPES, draw_scene, letter_page
from minivlm.models import llava_next
from minivlm.train import initialise

SIGN = CLASS_NAMES.index("sign")  # shapes stand before it, letters behind it
CORNERS = [(0, 0), (0, TILE), (TILE, 0), (TILE, TILE)]  # of the tiles


def test_covers_are_where_the_shapes_are():
    scene = next(s for s in map(draw_scene, range(100)) if (s.height, s.width) == (LONG_SIDE, LONG_SIDE) and s.sign)
    labels = label_map(scene, LONG_SIDE, LONG_SIDE)
    covers = covers_of_patches(labels)  # (5, P, classes + colours + shapes)
    for tile, (top, left) in enumerate(CORNERS, start=1):
        for patch in range(SIDE * SIDE):
            y, x = top + patch // SIDE * PATCH, left + patch % SIDE * PATCH
            counts = np.bincount(labels[y : y + PATCH, x : x + PATCH].ravel(), minlength=len(CLASS_NAMES))
            things = counts[1:SIGN].reshape(len(SHAPES), len(COLOURS))
            expected = np.concatenate([counts, things.sum(0), things.sum(1)]) >= 0.1 * PATCH * PATCH
            assert torch.equal(covers[tile, patch], torch.from_numpy(expected).float())
    assert covers[0, :, 1:SIGN].any(), "the overview shows shapes, too"


def test_a_page_of_letters_is_covered_with_them():
    for seed in range(4):
        page = letter_page(seed)
        assert len(page.small_print) >= 6 and not page.things and page.sign is None
        covers = covers_of_patches(label_map(page, page.height, page.width))[1:]
        assert covers[..., SIGN + 1 : len(CLASS_NAMES)].any(dim=2).float().mean() > 0.4, "of all patches"


@pytest.mark.parametrize("seed", range(30))
def test_every_thing_is_read_once_in_either_view(seed):
    scene = draw_scene(seed)
    readings = readings_of_patches(scene)
    signs = 1 if scene.sign else 0
    names = sorted(f"{thing.colour} {thing.shape}" for thing in scene.things) + ["sign"] * signs
    for views in (readings[:1], readings[1:]):
        things, sizes = views[..., QUESTION["thing"]], views[..., QUESTION["size"]]
        read = [READINGS["thing"][i] for i in things[things > 0].tolist()]
        assert sorted(read, key=lambda name: (name == "sign", name)) == names
        assert sorted(READINGS["size"][i] for i in sizes[sizes > 0].tolist()) == sorted(t.size for t in scene.things)


@pytest.mark.parametrize("seed", range(30))
def test_places_are_read_from_the_overview(seed):
    """The tiles do not show where on the poster they are."""
    scene = draw_scene(seed)
    readings = readings_of_patches(scene)
    names, places = readings[0, :, QUESTION["thing"]], readings[0, :, QUESTION["place"]]
    read = {READINGS["place"][p]: READINGS["thing"][n] for n, p in zip(names.tolist(), places.tolist(), strict=True)}
    expected = {thing.place: f"{thing.colour} {thing.shape}" for thing in scene.things}
    expected |= {scene.sign.place: "sign"} if scene.sign else {}
    assert read == {"none": "none"} | expected
    assert (readings[1:, :, QUESTION["place"]] == UNREADABLE).all()


@pytest.mark.parametrize("seed", range(30))
def test_a_word_is_read_in_order(seed):
    """Line by line over the four tiles put together, left half before right half: the letters of the sign."""
    scene = draw_scene(seed)
    readings = readings_of_patches(scene)
    halves = readings[..., QUESTION["left letter"] : QUESTION["right letter"] + 1]
    assert (halves[0] == UNREADABLE).all()
    page = halves[1:].view(2, 2, SIDE, SIDE, 2).transpose(1, 2).reshape(2 * SIDE, 4 * SIDE)
    assert "".join(LETTERS[i - 1] for i in page[page > 0].tolist()) == (scene.sign.text if scene.sign else "")


def test_middles_are_inside_what_they_name():
    for seed in range(20):
        scene = draw_scene(seed)
        labels = label_map(scene, 4 * scene.height)
        for y, x, name, _ in middles(scene):
            shown = CLASS_NAMES[labels[int(4 * y), int(4 * x)]]
            assert shown in (name, name.partition(" ")[2]) or name == "sign" and shown in LETTERS


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
    assert all(p.grad is not None for p in reader.read.parameters())


def token_reader():
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    processor = llava_next.Processor.from_folder(DEMO_CHECKPOINT, config)
    model = llava_next.Model.from_config(config)
    initialise(model)
    words = model.language_model.embed_tokens.weight[: len(WORDS)]
    return TokenReader(model.vision_tower, model.multi_modal_projector, words), Patches(processor.images, 1, 2)[0]


def test_image_tokens_are_read_at_any_loudness():
    reader, batch = token_reader()
    quiet = reader.loss(batch)
    with torch.no_grad():
        for parameter in reader.projector.linear_2.parameters():
            parameter *= 10
    torch.testing.assert_close(reader.loss(batch), quiet, rtol=1e-4, atol=0)


def test_image_tokens_come_to_resemble_their_words():
    reader, batch = token_reader()
    reader.tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in reader.parameters() if p.requires_grad], lr=3e-3)
    right = words_of_patches(batch[2]) > 0

    def likeness():
        with torch.no_grad():
            scores = F.normalize(reader.features(batch[0]), dim=-1) @ reader.words.T  # (I, P, words)
        return (scores[right].mean() - scores[~right].mean()).item()

    before = likeness()
    for _ in range(25):
        optimizer.zero_grad()
        reader.loss(batch).backward()
        optimizer.step()
    assert likeness() > before + 0.04


def test_words_of_patches_are_those_of_their_answers():
    answers = torch.zeros(1, 3, len(READINGS), dtype=torch.int64)  # the first patch: none of all
    for name, answer in (("thing", "blue star"), ("size", "small"), ("place", "top left")):
        answers[0, 1, QUESTION[name]] = READINGS[name].index(answer)
    answers[0, 2, QUESTION["place"]] = UNREADABLE
    answers[0, 2, QUESTION["left letter"]] = answers[0, 2, QUESTION["right letter"]] = READINGS["left letter"].index(
        "O"
    )
    said = [{WORDS[i] for i in patch.nonzero().flatten().tolist()} for patch in words_of_patches(answers)[0]]
    assert said == [set(), {"blue", "star", "small", "top left"}, {"O"}]
