"""The demo world: posters, questions about them, and conversations to learn from.

    python -m minivlm.demo.world --seed 7 --out poster.png       one poster and its questions
    python -m minivlm.demo.world --grid --out sheet.png          a contact sheet
    python -m minivlm.demo.world --bundled FOLDER                the pictures in minivlm/demo/pictures, drawn again

Everything is a function of a seed. Models are trained on TRAIN_SEEDS and judged on HELD_OUT_SEEDS.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from minivlm.demo.draw import CLASS_NAMES, label_map, render
from minivlm.demo.questions import KINDS, Question, questions
from minivlm.demo.scene import HELD_OUT_SEEDS, LONG_SIDE, TRAIN_SEEDS, Scene, draw_scene

__all__ = ["CLASS_NAMES", "HELD_OUT_SEEDS", "KINDS", "LONG_SIDE", "TRAIN_SEEDS", "Question", "Scene"]
__all__ += ["conversation", "corpus", "draw_scene", "label_map", "questions", "render"]

PICTURES = Path(__file__).with_name("pictures")
BUNDLED = {  # file name → place in HELD_OUT_SEEDS
    "shapes.png": 17017,
    "stars.png": 3567,
    "number.png": 1287,
    "home.png": 18845,
    "circles.png": 2934,
}
BUNDLED_SIZE = 336  # pixels, the longer side


def conversation(seed: int, turns: int = 5) -> tuple[Scene, list[dict]]:
    """Scene number `seed` and a talk about it: `turns` questions, as unlike in kind as can be, answered, as messages.

    The first question's content starts with `{"type": "image"}`; the caller adds the picture, at the size it wants.
    """
    scene, rng = draw_scene(seed), np.random.default_rng((seed, 2))
    by_kind = {kind: [] for kind in KINDS}
    for i in rng.permutation(len(asked := questions(scene, seed))):
        by_kind[asked[i].kind].append(asked[i])
    order = []  # one of each kind in random order, but two to find something, the widest kind; then so again
    while any(by_kind.values()):
        left = [kind for kind in (*KINDS, "find") if by_kind[kind]]
        order += [by_kind[left[i]].pop() for i in rng.permutation(len(left)) if by_kind[left[i]]]
    order = order[:turns]
    if rng.random() < 0.75:  # a description gives away what is asked after it: nobody would have to look any more
        order.sort(key=lambda question: question.kind == "describe")
    messages = []
    for question in order:
        messages.append({"role": "user", "content": [{"type": "text", "text": question.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return scene, messages


def corpus(scenes: int = 2000) -> Iterator[str]:
    """Questions and answers of the first `scenes` training scenes: what a tokenizer learns the world's words from."""
    for seed in TRAIN_SEEDS[:scenes]:
        for question in questions(draw_scene(seed), seed):
            yield question.question
            yield question.answer


def poster(seed: int, side: int) -> Image.Image:
    """Scene number `seed` with its longer side `side` pixels."""
    scene = draw_scene(seed)
    return render(scene, scene.height * side // LONG_SIDE, scene.width * side // LONG_SIDE)


def contact_sheet(seeds, columns: int, side: int) -> Image.Image:
    """Posters of the given seeds side by side, the longer side of each `side` pixels."""
    seeds, gap = list(seeds), side // 16
    rows = -(-len(seeds) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for i, seed in enumerate(seeds):
        row, column = divmod(i, columns)
        picture = poster(seed, side)
        top = gap + row * (side + gap) + (side - picture.height) // 2
        sheet.paste(picture, (gap + column * (side + gap) + (side - picture.width) // 2, top))
    return sheet


def bundled_pictures() -> Iterator[tuple[str, Image.Image]]:
    """(file name, picture) of the pictures that ship with the package."""
    for name, number in BUNDLED.items():
        yield name, poster(HELD_OUT_SEEDS[number], BUNDLED_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minivlm.demo.world", description="Draw posters of the demo world.")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEEDS.start, help="scene (default: a held-out one)")
    parser.add_argument("--size", type=int, default=2 * LONG_SIDE, help="longer side in pixels (default: %(default)s)")
    parser.add_argument("--grid", action="store_true", help="a contact sheet of 24 scenes from --seed on")
    parser.add_argument("--out", type=Path, default=Path("poster.png"), help="file to write (default: %(default)s)")
    parser.add_argument("--bundled", type=Path, metavar="FOLDER", help="write the package's own pictures there instead")
    args = parser.parse_args()
    if args.bundled:
        for name, picture in bundled_pictures():
            picture.save(args.bundled / name, optimize=True)
    elif args.grid:
        contact_sheet(range(args.seed, args.seed + 24), 6, args.size).save(args.out)
    else:
        poster(args.seed, args.size).save(args.out)
        for question in questions(draw_scene(args.seed), args.seed):
            print(f"{question.kind:9}{question.question}  →  {question.answer}")


if __name__ == "__main__":
    main()
