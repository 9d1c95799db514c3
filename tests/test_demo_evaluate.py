"""The evaluator, judged on models that are known to be right, wrong, or blind to small writing."""

import json
from dataclasses import dataclass

import pytest

import minivlm
from minivlm.demo import evaluate
from minivlm.demo.questions import KINDS
from minivlm.errors import MinivlmError


@dataclass
class Result:
    text: str


class Oracle:
    """A stand-in for a model: knows every answer, but reads a sign only where it is given tiles."""

    def __init__(self, scenes, nearly=""):
        self.known = {message_key(message): question for message, question in evaluate.held_out(scenes)}
        self.nearly, self.batches = nearly, []

    def generate(self, batch, max_new_tokens, images_kwargs):
        assert max_new_tokens > 100 and all(len(messages) == 1 for messages in batch)
        self.batches.append(len(batch))
        asked = [self.known[message_key(message)] for (message,) in batch]
        blind = images_kwargs == {"image_grid_pinpoints": [[72, 72]]}
        return [Result("?" if blind and q.kind == "read" else f" {q.answer}{self.nearly}\n") for q in asked]


def message_key(message):
    picture, text = message["content"]
    return picture["image"].tobytes(), text["text"]


def run(monkeypatch, capsys, oracle, *args):
    monkeypatch.setitem(vars(minivlm), "load", lambda _folder: oracle)
    evaluate.main(["--scenes", "6", "--batch-size", "16", *args])
    return capsys.readouterr()


def test_oracle_is_right_about_everything_but_reads_only_with_tiles(monkeypatch, capsys):
    out, err = run(monkeypatch, capsys, Oracle(6), "--json")
    scores = json.loads(out)["scores"]
    assert set(scores) >= {*KINDS, "overall"}
    for row, cells in scores.items():
        assert cells["with tiles"] == 1
        if not row.startswith("read"):
            assert cells["without tiles"] == (1 - scores["read"]["n"] / cells["n"] if row == "overall" else 1)
        else:
            assert cells["without tiles"] == 0
    assert "with tiles" in err  # progress


def test_nearly_right_is_wrong(monkeypatch, capsys):
    out, err = run(monkeypatch, capsys, Oracle(6, nearly="!"), "--json", "--mistakes", "2")
    scores = json.loads(out)["scores"]
    assert {cells["with tiles"] for cells in scores.values()} == {0}
    assert err.count("with tiles: ") >= 2 and "!" in err


def test_table_has_a_row_per_kind_and_the_columns_asked_for(monkeypatch, capsys):
    header, *rows = run(monkeypatch, capsys, Oracle(6)).out.splitlines()
    assert header.split() == ["kind", "n", "with", "tiles", "without", "tiles"]
    assert [row.split()[0] for row in rows[: len(KINDS)]] == list(KINDS)
    assert len({len(line) for line in (header, *rows)}) == 1
    header, *rows = run(monkeypatch, capsys, Oracle(6), "--no-tiles").out.splitlines()
    assert header.split() == ["kind", "n", "without", "tiles"]


def test_every_question_is_asked_once_in_batches(monkeypatch, capsys):
    oracle = Oracle(6)
    scores = json.loads(run(monkeypatch, capsys, oracle, "--no-tiles", "--json").out)["scores"]
    assert sum(oracle.batches) == scores["overall"]["n"] == sum(scores[kind]["n"] for kind in KINDS)
    assert set(oracle.batches[:-1]) == {16}


def test_missing_model_is_one_line(monkeypatch):
    def load(folder):
        raise MinivlmError(f"{folder}: no such folder")

    monkeypatch.setitem(vars(minivlm), "load", load)
    with pytest.raises(SystemExit, match="^error: nowhere: no such folder$"):
        evaluate.main(["--ckpt", "nowhere"])
