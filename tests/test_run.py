"""The command line: what its flags mean, what goes to which stream, how it ends."""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_vlm import FakeVLM
from films import write_film

from minivlm import run
from minivlm.console import explain
from minivlm.demo import DEMO_CHECKPOINT, DEMO_PICTURE
from minivlm.demo.questions import describe
from minivlm.demo.scene import HELD_OUT_SEEDS, draw_scene
from minivlm.demo.world import BUNDLED
from minivlm.errors import MinivlmError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command with a fake model; returns (exit code, stdout, stderr) and keeps what the model was asked."""

    def command(*argv):
        command.vlm = FakeVLM()
        monkeypatch.setattr(run, "open_vlm", lambda *_, **__: command.vlm)
        try:
            code = run.main(list(argv))
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return command


def asked(command):
    """(kinds and contents of the last message's parts, sampling)."""
    messages, sampling = command.vlm.asked[-1]
    return [part.get("text", part.get("image")) for part in messages[-1]["content"]], sampling


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_the_answer_goes_to_stdout_and_nothing_else_does(command):
    assert command("--ckpt", "x", "--prompt", "Why?") == (0, "0 pictures: Why?\n", "")


def test_without_arguments_the_bundled_picture_is_described(command):
    code, out, err = command()
    (picture, text), sampling = asked(command)
    assert code == 0 and out == f"1 pictures: {run.QUESTION}\n"
    assert Path(picture).is_file() and text == run.QUESTION and sampling == {}
    assert picture in err and run.QUESTION in err


def test_pictures_come_in_order_before_the_text(command):
    command("--ckpt", "x", "--image", "a.png", "-p", "Why?", "--image", "data:image/png;base64,xx")
    assert asked(command)[0] == ["a.png", "data:image/png;base64,xx", "Why?"]


def test_films_come_in_order_after_the_pictures(command):
    command("--ckpt", "x", "--video", "a.mp4", "-p", "Why?", "--image", "b.png", "--video", "c.mp4", "--fps", "2")
    (message,), _ = command.vlm.asked[-1]
    film = {"type": "video", "fps": 2}
    assert message["content"] == [
        {"type": "image", "image": "b.png"},
        film | {"video": "a.mp4"},
        film | {"video": "c.mp4"},
        {"type": "text", "text": "Why?"},
    ]


def test_a_film_alone_is_described_and_no_picture_comes_with_it(command):
    _, _, err = command("--video", "a.mp4", "--num-frames", "3")
    (message,), _ = command.vlm.asked[-1]
    assert message["content"] == [
        {"type": "video", "video": "a.mp4", "num_frames": 3},
        {"type": "text", "text": run.FILM_QUESTION},
    ]
    assert run.FILM_QUESTION in err


def test_a_conversation_takes_films_and_their_rate(command, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("what\n"))
    film = str(write_film(tmp_path / "a.mp4", 24))
    assert command("--ckpt", "x", "--chat", "--video", film, "--num-frames", "3")[0] == 0
    (message,), _ = command.vlm.asked[-1]
    assert message["content"][0]["num_frames"] == 3 and message["content"][0]["video"].source == film


def test_a_given_picture_replaces_the_bundled_one(command):
    command("--image", "a.png")
    assert asked(command)[0] == ["a.png", run.QUESTION]


@pytest.mark.parametrize("flags", [["--max-new-tokens", "7"], ["--max_new_tokens=7"], ["--max-new-tokens=7"]])
def test_hyphen_and_underscore_are_the_same(command, flags):
    command("--ckpt", "x", "-p", "snake_case stays", *flags)
    assert asked(command) == (["snake_case stays"], {"max_new_tokens": 7})


def test_underscores_in_a_value_stay(command):
    command("--ckpt=x", "--prompt=snake_case=--a_b")
    assert asked(command)[0] == ["snake_case=--a_b"]


@pytest.mark.parametrize("flag", ["--ckpt", "--model", "--model-path", "--model_path"])
def test_the_model_has_three_names(flag):
    assert run.parse([flag, "x", "-p", "y"])["ckpt"] == "x"


def test_sampling_reaches_the_model(command):
    flags = "--temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --repetition-penalty 1.1 --seed 4 --stop a --stop b"
    command("--ckpt", "x", "-p", "y", *flags.split())
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 4}
    assert asked(command)[1] == {**wanted, "stop": ["a", "b"]}


def test_sampling_of_the_checkpoint_fills_in_what_the_flags_leave_open(command, monkeypatch, tmp_path):
    monkeypatch.setattr(FakeVLM, "folder", tmp_path, raising=False)
    config = {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": 2, "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    _, _, err = command("--ckpt", "x", "-p", "y", "--sampling", "checkpoint", "--top-k", "3")
    wanted = {"temperature": 1.0, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.05}
    assert asked(command)[1] == wanted and "top_p 0.8" in err
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "repetition_penalty": 1.05}')
    command("--ckpt", "x", "-p", "y", "--sampling", "checkpoint")
    assert asked(command)[1] == {"repetition_penalty": 1.05}
    command("--ckpt", "x", "-p", "y")
    assert asked(command)[1] == {}


def test_system_message_comes_first(command):
    command("--ckpt", "x", "-p", "y", "--system", "be brief")
    assert [message["role"] for message in command.vlm.asked[0][0]] == ["system", "user"]


def test_messages_file_is_the_conversation(command, tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "zwölf"}]}]
    (tmp_path / "m.json").write_text(json.dumps(messages), encoding="utf-8")
    command("--ckpt", "x", "--messages", str(tmp_path / "m.json"))
    assert command.vlm.asked[0][0] == messages


def test_raw_prompt_is_a_prompt():
    prompt = run.question_of(run.parse(["--ckpt", "x", "--raw", "-p", "<image>\nA", "--image", "a.png"]))
    assert (prompt.text, prompt.images) == ("<image>\nA", ["a.png"])


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(command):
    code, out, err = command("--ckpt", "x", "-p", "zwölf", "--json")
    shown = json.loads(out)
    assert code == 0 and err == ""
    assert set(shown) == {"text", "token_ids", "prompt_token_ids", "finish_reason", "stats"}
    assert shown["text"] == "0 pictures: zwölf" and shown["prompt_token_ids"] == [1, 2, 3]
    assert shown["stats"]["peak_memory_bytes"] > 2**20


def test_stats_go_to_stderr(command):
    code, out, err = command("--ckpt", "x", "-p", "y", "--stats")
    assert out == "0 pictures: y\n"
    assert [line.split()[0] for line in err.splitlines()] == [
        "load_seconds", "first_token_seconds", "tokens_per_second", "new_tokens", "peak_memory_bytes",
    ]  # fmt: skip


def test_help_names_every_flag_and_gives_examples(command):
    code, out, _ = command("--help")
    assert code == 0 and "examples:" in out and "Exit codes" in out
    for flags in run.FLAGS.values():
        assert all(name in out for names, _, _ in flags for name in names.split())


def test_list_shows_each_alias_with_its_repository(command):
    code, out, err = command("--list")
    assert code == 0 and err == ""
    assert [line.split() for line in out.splitlines() if line.startswith("llava-v1.6 ")] == [
        ["llava-v1.6", "14.1", "GB", "no", "llava-hf/llava-v1.6-vicuna-7b-hf"]
    ]


def test_every_flag_of_the_examples_exists():
    words = {word for word in run.EXAMPLES.split() if word.startswith("--")}
    known = {name for flags in run.FLAGS.values() for names, _, _ in flags for name in names.split()}
    assert words <= known and len(words) > 8


# --- how it ends -----------------------------------------------------------------------------------------------------

USAGE_ERRORS = [
    "--ckpt",
    "--ckpt x",
    "--prompt a --prom b",
    "--unknown",
    "positional",
    "--temperature warm",
    "--temperature -1",
    "--top-p 0",
    "--max-new-tokens 0",
    "--num-beams 2 --temperature 1",
    "--dtype float8",
    "--batch a.jsonl",
    "--output a.jsonl",
    "--batch a --output b --prompt c",
    "--batch a --output b --chat",
    "--chat --json",
    "--messages a --prompt b",
    "--messages a --image b",
    "--raw",
    "--raw --prompt a --system b",
    "--dry-run --json",
    "--revision main",
    "--video a.mp4 --fps 1 --num-frames 2",
    "--video a.mp4 --fps 0",
    "--video a.mp4 --fps nan",
    "--video a.mp4 --num-frames 0",
    "--video a.mp4 --num-frames 1.5",
    "--image a.png --fps 1",
    "--messages a --video b",
    "--batch a --output b --video c",
    "--raw --prompt a --video b --fps 1",
]


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_a_command_that_makes_no_sense_exits_with_2(command, line):
    code, out, err = command(*line.split())
    assert code == 2 and out == ""
    assert err.splitlines()[-1].startswith("minivlm: ")
    assert command.vlm.asked == []


def test_an_error_is_one_line_and_exit_code_1(command):
    assert command("--ckpt", "x", "-p", "fail") == (1, "", "minivlm: the picture is broken: give another\n")


def test_a_bug_is_one_line_unless_debugging(command):
    code, out, err = command("--ckpt", "x", "-p", "bug")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "unexpected TypeError: no such thing" in err
    code, _, err = command("--ckpt", "x", "-p", "bug", "--debug")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_an_unreadable_messages_file_is_one_line(command, tmp_path, content):
    if content is not None:
        (tmp_path / "m.json").write_bytes(content)
    code, out, err = command("--ckpt", "x", "--messages", str(tmp_path / "m.json"))
    assert (code, out) == (1, "") and err.startswith("minivlm: --messages") and err.count("\n") == 1


def test_ctrl_c_ends_with_1_and_no_traceback(command):
    assert command("--ckpt", "x", "-p", "ctrl-c") == (1, "0", "minivlm: stopped\n")


def test_out_of_memory_says_what_to_try():
    assert "--dry-run" in explain(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert "--dry-run" in explain(raised.value)
    assert explain(MinivlmError("two\nlines")) == "two lines"


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(capsys):
    """What the bundled model says, in this process: (stdout, stderr)."""

    def answered(*argv):
        assert run.main(list(argv)) == 0
        return capsys.readouterr()

    return answered


def test_without_arguments_the_bundled_model_describes_the_bundled_picture(answered):
    """Rightly, to the letter. How often it is right is test_vlm.py's and the evaluator's to say."""
    told, notes = answered()
    assert told == describe(draw_scene(HELD_OUT_SEEDS[BUNDLED[DEMO_PICTURE.name]])) + "\n"
    assert DEMO_PICTURE.name in notes and "demo model" in notes


def test_json_and_text_are_the_same_answer(answered):
    shown = json.loads(answered("--json", "--max-new-tokens", "5")[0])
    assert answered("--max-new-tokens", "5")[0] == shown["text"] + "\n"
    assert (shown["finish_reason"], len(shown["token_ids"])) == ("length", 5)


def test_show_prompt_counts_the_picture_s_tokens(answered):
    flags = ["-p", "How many <image> shapes?", "--max-new-tokens", "1"]
    _, err = answered("--show-prompt", *flags)
    count = int(err.split("<image>×")[1].split()[0])
    token_ids = json.loads(answered("--json", *flags)[0])["prompt_token_ids"]
    assert max(token_ids.count(token_id) for token_id in set(token_ids)) == count
    assert "How many <image> shapes?" in err  # typed by the user: text, and without a number


def test_dry_run_draws_the_tiles_and_counts_tokens(answered):
    question = ["--image", str(DEMO_PICTURE.with_name("number.png")), "-p", "How many?"]
    out, _ = answered("--dry-run", *question)
    token_ids = json.loads(answered("--json", *question, "--max-new-tokens", "1")[0])["prompt_token_ids"]
    assert "+---+---+" in out and "picture 1: 252 × 336 pixels" in out
    assert f"prompt: {len(token_ids)} tokens; the answer may add 256" in out


def test_dry_run_reads_no_weights(answered, tmp_path):
    for file in DEMO_CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    out, _ = answered("--dry-run", "--ckpt", str(tmp_path), "--image", str(DEMO_PICTURE))
    assert "MiB for the weights" in out


# --- in a process of its own -----------------------------------------------------------------------------------------


def start(*argv, **streams):
    """The command in a process of its own, with the fake model."""
    script = (
        "import sys, fake_vlm; from minivlm import run;"
        "run.open_vlm = lambda *_, **__: fake_vlm.FakeVLM(); sys.exit(run.main())"
    )
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    return subprocess.Popen([sys.executable, "-c", script, *argv], env={**os.environ, "PYTHONPATH": path}, **streams)


def test_a_reader_that_has_seen_enough_is_no_error():
    process = start("--ckpt", "x", "-p", "slow", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_a_real_ctrl_c_does_not_end_a_conversation():
    """The process signals itself, in the middle of an answer: a signal from here could come while it waits for the
    next question, where Python may drop the line that it reads at that moment."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    out, err = start("--ckpt", "x", "--chat", "-p", "ctrl-c", **pipes).communicate(b"more\n")
    assert out == b"0\n0 pictures: more\n" and err == b"(stopped)\n"


def test_a_whole_run_leaves_the_compiler_alone():
    """Initialising a parameter on the meta device is enough to import it, at more than a second."""
    script = "import sys; from minivlm.run import main; main(['--max-new-tokens', '2']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "minivlm.generate"} <= loaded
    assert loaded & {"torch._dynamo", "sympy", "transformers", "matplotlib", "av"} == set()


def test_torch_is_imported_without_a_search_for_garbage():
    """Which would take a seventh of the time that the whole demo takes; afterwards it goes on, torch left out."""
    script = """
import gc
searches = []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
from minivlm.run import import_torch
before = len(searches)
import_torch()
print(len(searches) - before, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0 True True\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_stays_with_the_process():
    """A tensor of 31 MB is a mapping of its own before, and afterwards in the heap, which does not shrink behind it."""
    script = """
import torch
from minivlm.run import keep_freed_memory
def place():
    return torch.empty(31 * 2**18).data_ptr()  # and gone
def in_heap(pointer):
    (heap,) = (line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
    start, end = (int(side, 16) for side in heap.split("-"))
    return start < pointer < end - 31 * 2**20
before = in_heap(place())
keep_freed_memory()
print(before, in_heap(place()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


def test_help_needs_nothing_installed():
    """`-S` hides every installed package, torch included."""
    command = [sys.executable, "-S", "-m", "minivlm.run", "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.startswith(b"usage: minivlm")
