"""The demo world is what it says: scenes from seeds, things where their names say, labels where the pixels are."""

import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image

from minivlm.demo import world
from minivlm.demo.questions import NUMBERS, describe
from minivlm.demo.scene import COLOURS, HELD_OUT_WORDS, PLACES, RADII, SHAPES, WORDS

SEEDS = [*world.TRAIN_SEEDS[:300], *world.HELD_OUT_SEEDS[:300]]


def region(name, length):
    """What a person calls left, centre, right: thirds of the poster, with a margin for things near a border."""
    low, high = {0: (0.0, 0.38), 1: (0.38, 0.62), 2: (0.62, 1.0)}[name]
    return low * length, high * length


def test_scene_is_a_function_of_its_seed():
    assert world.draw_scene(5) == world.draw_scene(5)
    assert world.conversation(5) == world.conversation(5)
    assert len({repr(world.draw_scene(seed)) for seed in range(50)}) == 50


def test_scene_is_the_same_on_every_machine():
    scene = world.draw_scene(world.HELD_OUT_SEEDS[world.BUNDLED["shapes.png"]])
    assert [(t.colour, t.shape, t.place) for t in scene.things] == [
        ("yellow", "heart", "top left"),
        ("purple", "heart", "top right"),
        ("purple", "triangle", "left"),
        ("orange", "square", "centre"),
        ("blue", "star", "bottom left"),
    ]
    assert (scene.sign.text, scene.sign.place) == ("MOON", "bottom")


def test_train_and_held_out_share_no_seed_and_no_reserved_word():
    assert world.TRAIN_SEEDS.stop <= world.HELD_OUT_SEEDS.start
    assert not set(WORDS) & set(HELD_OUT_WORDS)
    assert all(word.isalpha() and word.isupper() and 3 <= len(word) <= 5 for word in WORDS + HELD_OUT_WORDS)
    texts = {
        split: {scene.sign.text for scene in map(world.draw_scene, seeds[:1500]) if scene.sign}
        for split, seeds in (("train", world.TRAIN_SEEDS), ("held out", world.HELD_OUT_SEEDS))
    }
    assert not texts["train"] & set(HELD_OUT_WORDS)
    assert texts["held out"] >= set(HELD_OUT_WORDS)


def test_places_are_where_their_names_say():
    for scene in map(world.draw_scene, SEEDS):
        everything = [*scene.things, *([scene.sign] if scene.sign else [])]
        assert len({thing.place for thing in everything}) == len(everything)
        for thing in everything:
            assert thing.place in scene.places
            ((row, column),) = [(i, j) for i, j in product(range(3), range(3)) if PLACES[i][j] == thing.place]
            for i, at, length in ((row, thing.y, scene.height), (column, thing.x, scene.width)):
                low, high = region(i, length)
                assert low < at < high, thing


def test_nothing_overlaps_or_leaves_the_poster():
    """Drawn alone, on three times the paper, everything takes as many pixels as it has among the others."""
    for seed in SEEDS[::6]:
        scene = world.draw_scene(seed)
        together = world.label_map(scene)
        bare = {"things": (), "sign": None}
        parts = [{**bare, "things": (thing,)} for thing in scene.things] + [{**bare, "sign": scene.sign}]
        alone = sum(np.count_nonzero(world.label_map(type(scene)(**{**vars(scene), **part}))) for part in parts)
        assert alone == np.count_nonzero(together)
        edges = np.concatenate([together[0], together[-1], together[:, 0], together[:, -1]])
        assert not edges.any()


def test_label_map_names_what_the_picture_shows():
    """At each thing's middle the picture has its colour and the map its class; on paper the map is 0."""
    for seed in SEEDS[::3]:
        scene = world.draw_scene(seed)
        height, width = scene.height, scene.width
        pixels = np.asarray(world.render(scene, height, width)).astype(int)
        labels = world.label_map(scene, height, width)
        assert pixels.shape == (height, width, 3) and labels.shape == (height, width) and labels.dtype == np.uint8
        for thing in scene.things:
            y, x = int(thing.y), int(thing.x)
            assert world.CLASS_NAMES[labels[y, x]] == f"{thing.colour} {thing.shape}"
            assert pixels[y, x].tolist() == list(COLOURS[thing.colour])
        shown = {world.CLASS_NAMES[i] for i in np.unique(labels)}
        things = {f"{thing.colour} {thing.shape}" for thing in scene.things}
        assert shown == {"background"} | things | ({"sign", *scene.sign.text} if scene.sign else set())
        assert (pixels[labels == 0].min(axis=-1) < 130).mean() < 0.01  # paper is light, edges and shadows apart


def test_letters_stand_in_their_boxes():
    """In reading order, with ink in every box and hardly any between them (drawn large, where edges count little)."""
    for scene in map(world.draw_scene, SEEDS[::25]):
        if not scene.sign or len(set(scene.sign.text)) < len(scene.sign.text):
            continue
        height = 8 * scene.height
        grey = np.asarray(world.render(scene, height).convert("L")).astype(int)
        labels = world.label_map(scene, height)
        boxes = [labels == world.CLASS_NAMES.index(letter) for letter in scene.sign.text]
        rows, columns = np.nonzero(np.any(boxes, axis=0))
        text = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        gaps = labels[text] == world.CLASS_NAMES.index("sign")
        board = np.median(grey[text][gaps])
        ink = [np.abs(grey[box] - board).mean() for box in boxes]
        assert min(ink) > 3 * np.abs(grey[text][gaps] - board).mean()
        lefts = [np.nonzero(box)[1].min() for box in boxes]
        assert lefts == sorted(lefts)


def test_sizes_and_colours_are_far_apart():
    assert RADII["large"][0] > 1.4 * RADII["small"][1]
    colours = np.array(list(COLOURS.values()))
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(len(colours), dtype=int)
    assert distance.min() > 90


def test_render_follows_the_size_asked_for():
    scene = world.draw_scene(world.HELD_OUT_SEEDS[1287])  # landscape
    assert world.render(scene).size == (288, 216)
    assert world.render(scene, 108).size == world.render(scene, 108, 144).size == (144, 108)
    assert world.label_map(scene, 72, 72).shape == (72, 72)
    for height, width in ((108, 144), (72, 72), (144, 144), (200, 100)):  # the last three squash it
        theirs = world.render(scene).resize((width, height), Image.Resampling.BICUBIC)
        ours = world.render(scene, height, width)
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).mean() < 2
        largest = max(scene.things, key=lambda thing: thing.radius)
        label = world.label_map(scene, height, width)[
            int(largest.y / scene.height * height), int(largest.x / scene.width * width)
        ]
        assert world.CLASS_NAMES[label] == f"{largest.colour} {largest.shape}"


def test_conversation_is_messages_with_one_picture_in_front():
    for seed in SEEDS[:100]:
        scene, messages = world.conversation(seed, turns=4)
        assert scene == world.draw_scene(seed)
        assert [message["role"] for message in messages] == ["user", "assistant"] * 4
        parts = [part for message in messages for part in message["content"]]
        assert parts[0] == {"type": "image"} and all(part["type"] == "text" for part in parts[1:])
        asked = {question.question: question for question in world.questions(scene, seed)}
        kinds = [asked[message["content"][-1]["text"]].kind for message in messages[::2]]
        assert all(kinds.count(kind) <= (2 if kind == "find" else 1) for kind in kinds)


def test_conversations_ask_every_kind_about_equally_often_but_find_twice():
    kinds = Counter()
    for seed in range(400):
        scene, messages = world.conversation(seed)
        asked = {question.question: question.kind for question in world.questions(scene, seed)}
        kinds.update(asked[message["content"][-1]["text"]] for message in messages[::2])
    assert set(kinds) == set(world.KINDS)
    shares = {kind: kinds[kind] / kinds.total() for kind in world.KINDS}
    assert 0.25 < shares.pop("find") < 0.35 and shares.pop("read") > 0.05
    assert all(0.12 < share < 0.19 for share in shares.values()), shares


def test_most_descriptions_give_nothing_away():
    last = 0
    for seed in range(400):
        scene, messages = world.conversation(seed, turns=7)
        last += messages[-1]["content"][0]["text"] == describe(scene)
    assert 0.7 < last / 400 < 0.9


def test_corpus_spells_every_letter_and_answer():
    words = {word for text in world.corpus(800) for word in text.replace("?", " ").replace(".", " ").split()}
    assert words >= {*SHAPES, *COLOURS, *NUMBERS, "yes", "no", "nothing", "small", "large"}
    assert {letter for word in words if word.isupper() for letter in word} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert {digit for word in words if word.isdigit() for digit in word} == set("0123456789")
    assert not words & set(HELD_OUT_WORDS)


@pytest.mark.parametrize("name", world.BUNDLED)
def test_bundled_picture_is_what_the_world_draws(name):
    """Pillow's versions may round an edge differently: a few pixels may be off by a little, no more."""
    ours = np.asarray(dict(world.bundled_pictures())[name]).astype(int)
    shipped = np.asarray(Image.open(world.PICTURES / name)).astype(int)
    assert ours.shape == shipped.shape and max(ours.shape) == world.BUNDLED_SIZE
    assert np.abs(ours - shipped).mean() < 0.1
    neighbour = world.poster(world.HELD_OUT_SEEDS[world.BUNDLED[name] + 1], world.BUNDLED_SIZE)
    other = np.asarray(neighbour.resize(shipped.shape[1::-1])).astype(int)
    assert np.abs(other - shipped).mean() > 1


def test_pictures_folder_holds_the_bundled_ones_only():
    assert {path.name for path in world.PICTURES.iterdir()} == set(world.BUNDLED)


def test_command_draws_a_poster_and_a_sheet(tmp_path):
    def draw(*args):
        command = [sys.executable, "-m", "minivlm.demo.world", "--size", "72", "--out", str(tmp_path / "x.png"), *args]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        return printed, np.asarray(Image.open(tmp_path / "x.png"))

    printed, ours = draw("--seed", "7")
    assert (ours == np.asarray(world.poster(7, 72))).all()
    assert "describe" in printed
    assert draw("--grid")[1].shape == (4 * 76 + 4, 6 * 76 + 4, 3)
