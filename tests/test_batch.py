"""Files of questions: what stands in the answers, what a bad row does, and what a killed run leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fake_vlm import FakeVLM
from hypothesis import given
from hypothesis import strategies as st

from minivlm.batch import question_of, read_row, run_batch
from minivlm.conversation import split_media
from minivlm.errors import MinivlmError

HERE = Path(__file__).parent


@pytest.fixture
def files(tmp_path):
    return tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_batch_answers_every_row(files):
    questions, answers = files
    message = {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "zwölf"}]}
    two = {"prompt": "two", "images": ["a.png"]}
    write(questions, {"prompt": "one", "id": {"mine": 7}}, "", two, {"messages": [message]})
    vlm = FakeVLM()
    assert run_batch(vlm, questions, answers, {"max_new_tokens": 5}) == 0
    first, second, third = read(answers)
    assert first["text"] == "0 pictures: one" and first["id"] == {"mine": 7} and first["row"] == 0
    assert second["text"] == "1 pictures: two" and second["row"] == 2 and "id" not in second
    assert third["text"] == "1 pictures: zwölf"
    assert set(first) == {"row", "of", "id", "text", "token_ids", "prompt_tokens", "finish_reason"}
    assert all(sampling == {"max_new_tokens": 5} for _, sampling in vlm.asked)


def test_batch_puts_stats_where_they_are_wanted(files):
    questions, answers = files
    write(questions, {"prompt": "one"})
    run_batch(FakeVLM(), questions, answers, {}, stats=True)
    assert read(answers)[0]["stats"]["new_tokens"] == len("0 pictures: one")


BAD_ROWS = {
    "not json": "{",
    "no object": "[]",
    "no question": "{}",
    "two questions": '{"prompt": "a", "messages": []}',
    "an unknown key": '{"prompt": "a", "image": "b.png"}',
    "a system beside messages": '{"messages": [], "system": "a"}',
    "a prompt that is a number": '{"prompt": 3}',
    "a system that is a number": '{"prompt": "a", "system": 3}',
    "endless brackets": "[" * 100_000,
    "images that are a name": '{"prompt": "a", "images": "b.png"}',
    "a question that fails": '{"prompt": "fail"}',
    "a bug": '{"prompt": "bug"}',
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_fails_is_reported_and_does_not_end_the_run(files, row):
    questions, answers = files
    write(questions, {"prompt": "one"}, row, {"prompt": "three"})
    assert run_batch(FakeVLM(), questions, answers, {}) == 1
    first, second, third = read(answers)
    assert "\n" not in second["error"] and second["error"] and "text" not in second
    assert first["text"] == "0 pictures: one" and third["text"] == "0 pictures: three"


def test_debug_ends_the_run_with_the_row_s_own_error(files):
    questions, answers = files
    write(questions, {"prompt": "bug"})
    with pytest.raises(TypeError):
        run_batch(FakeVLM(), questions, answers, {}, debug=True)


def test_a_second_call_goes_on_and_remembers_failures(files, capsys):
    questions, answers = files
    write(questions, {"prompt": "one"}, {"prompt": "fail"})
    assert run_batch(FakeVLM(), questions, answers, {}) == 1
    write(questions, {"prompt": "one"}, {"prompt": "fail"}, {"prompt": "three"})
    vlm = FakeVLM()
    assert run_batch(vlm, questions, answers, {}) == 1
    assert len(vlm.asked) == 1 and [row["row"] for row in read(answers)] == [0, 1, 2]
    assert "2 of 3 rows are in" in capsys.readouterr().err


@given(cut=st.integers(0, 400))
def test_a_half_written_line_is_written_again(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    questions, answers = folder / "q", folder / "a"
    write(questions, *({"prompt": f"number {i}"} for i in range(4)))
    run_batch(FakeVLM(), questions, answers, {})
    whole = answers.read_bytes()
    answers.write_bytes(whole[: max(0, len(whole) - cut)])
    assert run_batch(FakeVLM(), questions, answers, {}) == 0
    assert answers.read_bytes() == whole


def test_films_of_a_row_come_after_its_pictures_with_its_own_rate():
    row = {"prompt": "What?", "images": ["a.png"], "videos": ["b.mp4", "c.mp4"], "fps": 1}
    (message,) = question_of(read_row(json.dumps(row).encode()))
    film = {"type": "video", "fps": 1}
    assert message["content"][1:3] == [{**film, "video": "b.mp4"}, {**film, "video": "c.mp4"}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"videos": "a.mp4"}, "are lists"),
        ({"fps": 1}, "of which this row has none"),
        ({"messages": [], "num_frames": 3}, "a row has either"),
    ],
)
def test_a_row_s_films_are_checked(changes, says):
    with pytest.raises(MinivlmError, match=says):
        question_of({"prompt": "What?"} | changes)


ROWS = [
    b'{"prompt": "What is this?", "videos": ["cat.mp4"], "num_frames": 3}',
    b'{"id": 3, "prompt": "What is this?", "images": ["cat.jpg", "dog.jpg"], "system": "be brief"}',
    b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "x"}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text"}]}]}',
]


@given(st.sampled_from(ROWS), st.lists(st.tuples(st.integers(0, 120), st.binary(max_size=3)), max_size=4))
def test_a_damaged_row_is_a_conversation_or_a_one_line_error(row, changes):
    for place, new in changes:
        row = row[:place] + new + row[place + len(new) :]
    with suppress(MinivlmError):
        messages, _, _ = split_media(question_of(read_row(row)))
        assert all(isinstance(m["content"], list) for m in messages)


FOREIGN = {
    "text": "dear diary\n",
    "text without an end": "dear diary",
    "other json": '{"answer": 42}\n',
    "a number": "42\n",
    "other answers": '{"row": 0, "of": "0123456789ab", "text": "x"}\n',
    "a row that is not there": '{"row": 9, "of": "0123456789ab", "text": "x"}\n',
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_output_file_is_refused_and_left_alone(files, text):
    questions, answers = files
    write(questions, {"prompt": "one"})
    answers.write_text(text)
    with pytest.raises(MinivlmError, match="choose another --output"):
        run_batch(FakeVLM(), questions, answers, {})
    assert answers.read_text() == text


def test_a_file_that_cannot_be_read_or_written_is_one_line(files):
    questions, answers = files
    with pytest.raises(MinivlmError, match="cannot be read: No such file"):
        run_batch(FakeVLM(), questions, answers, {})
    write(questions, {"prompt": "one"})
    with pytest.raises(MinivlmError, match="cannot be written: No such file"):
        run_batch(FakeVLM(), questions, answers.parent / "none" / "a", {})
    with pytest.raises(MinivlmError, match="cannot be read: Is a directory"):
        run_batch(FakeVLM(), questions, answers.parent, {})


def test_a_killed_run_loses_no_finished_row(files):
    questions, answers = files
    write(questions, *({"prompt": "slow", "id": i} for i in range(12)))
    script = (
        "import sys; from pathlib import Path; from fake_vlm import FakeVLM; from minivlm.batch import run_batch;"
        "run_batch(FakeVLM(), Path(sys.argv[1]), Path(sys.argv[2]), {})"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    process = subprocess.Popen([sys.executable, "-c", script, *files], env=environment, stderr=subprocess.DEVNULL)
    while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = answers.read_bytes().count(b"\n")
    before = answers.read_bytes().split(b"\n")[:finished]
    assert 3 <= finished < 12

    vlm = FakeVLM()
    assert run_batch(vlm, questions, answers, {}) == 0
    assert len(vlm.asked) == 12 - finished
    assert answers.read_bytes().split(b"\n")[:finished] == before
    assert [row["id"] for row in read(answers)] == list(range(12))
