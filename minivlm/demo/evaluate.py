"""How often a demo model answers exactly right about held-out scenes: with tiles, and with the small overall view only.

    python -m minivlm.demo.evaluate                      the bundled model on 100 scenes, about 1700 questions
    python -m minivlm.demo.evaluate --ckpt DIR --json

Every question stands in a conversation of its own, and counts only if the answer is letter for letter the expected one.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import minivlm
from minivlm.demo.questions import KINDS, Question, questions
from minivlm.demo.scene import HELD_OUT_SEEDS, HELD_OUT_WORDS, LONG_SIDE, draw_scene
from minivlm.demo.world import render
from minivlm.errors import MinivlmError

BUNDLED_MODEL = Path(__file__).with_name("llava_next")
TILE = LONG_SIDE // 2  # pixels: the demo tower's input side
VIEWS = {  # column → images_kwargs
    "with tiles": {},
    "without tiles": {"image_grid_pinpoints": [[TILE, TILE]]},  # a grid of one tile, no larger than the base view
}
MAX_NEW_TOKENS = 160  # the longest description takes fewer


def held_out(num_scenes: int) -> list[tuple[dict, Question]]:
    """(message, Question) for everything that is asked about the first scenes of HELD_OUT_SEEDS, one kind after the
    other, so that a batch's answers are of like length."""
    asked = []
    for seed in HELD_OUT_SEEDS[:num_scenes]:
        scene = draw_scene(seed)
        picture = {"type": "image", "image": render(scene)}
        for question in questions(scene, seed):
            content = [picture, {"type": "text", "text": question.question}]
            asked.append(({"role": "user", "content": content}, question))
    return sorted(asked, key=lambda pair: KINDS.index(pair[1].kind))


def answers(vlm, asked: list[tuple[dict, Question]], batch_size: int, images_kwargs: dict, name: str) -> Iterator[str]:
    """The model's answer to each question, in order; progress goes to stderr."""
    with tqdm(total=len(asked), desc=name, file=sys.stderr, unit="question") as bar:
        for start in range(0, len(asked), batch_size):
            batch = [[message] for message, _ in asked[start : start + batch_size]]
            for result in vlm.generate(batch, max_new_tokens=MAX_NEW_TOKENS, images_kwargs=images_kwargs):
                yield result.text.strip()
            bar.update(len(batch))


def score(asked: list[Question], given: dict[str, list[str]]) -> dict[str, dict]:
    """{row: {"n": questions, view: share answered exactly right}}; the rows are the kinds, the words that no training
    scene shows (part of `read`), and all questions together."""
    rows = {kind: [i for i, question in enumerate(asked) if question.kind == kind] for kind in KINDS}
    rows["read, unseen words"] = [i for i in rows["read"] if asked[i].answer in HELD_OUT_WORDS]
    rows["overall"] = list(range(len(asked)))
    return {
        row: {"n": len(which)}
        | {view: sum(texts[i] == asked[i].answer for i in which) / len(which) for view, texts in given.items()}
        for row, which in rows.items()
        if which
    }


def table(scores: dict[str, dict]) -> str:
    """`score`'s result as aligned text, shares in per cent."""
    views = [column for column in scores["overall"] if column != "n"]
    lines = [f"{'kind':<20}{'n':>6}" + "".join(f"{view:>16}" for view in views)]
    for row, cells in scores.items():
        lines.append(f"{row:<20}{cells['n']:>6}" + "".join(f"{cells[view]:>16.1%}" for view in views))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minivlm.demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, default=BUNDLED_MODEL, metavar="DIR", help="default: the bundled model")
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="held-out scenes (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="default: %(default)s")
    parser.add_argument("--no-tiles", action="store_true", help="ask without tiles only (default: with, then without)")
    parser.add_argument("--mistakes", type=int, default=0, metavar="K", help="show the first K wrong answers on stderr")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    try:
        vlm = minivlm.load(str(args.ckpt))
        asked = held_out(args.scenes)
        views = {name: kwargs for name, kwargs in VIEWS.items() if not args.no_tiles or name == "without tiles"}
        given = {name: list(answers(vlm, asked, args.batch_size, kwargs, name)) for name, kwargs in views.items()}
    except MinivlmError as error:
        sys.exit(f"error: {error}")
    for name, texts in given.items():
        wrong = [(q, text) for (_, q), text in zip(asked, texts, strict=True) if text != q.answer]
        for question, text in wrong[: args.mistakes]:
            print(f"{name}: {question.question} {question.answer!r}, not {text!r}", file=sys.stderr)
    scores = score([question for _, question in asked], given)
    print(json.dumps({"scenes": args.scenes, "scores": scores}) if args.json else table(scores))


if __name__ == "__main__":
    main()
