"""The scripts of bench/ still run and print the tables they promise: toy sizes, and not a word about speed."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = re.compile(r"(?<= )(-?[\d.]+(?:e[+-]?\d+)?|nan|-?inf)(?: us| s|/s| MB| GB|%)?(?= |$)")


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(printed: str, row: str) -> list[list[float]]:
    """Of every line that begins with `row`: its figures, all finite and none below 0, which only noise could be."""
    lines = [line[len(row) :] for line in printed.splitlines() if line.startswith(row + " ")]
    found = [[float(figure) for figure in FIGURE.findall(line)] for line in lines]
    assert found, f"no line of {row} in\n{printed}"
    assert all(math.isfinite(figure) and figure >= 0 for line in found for figure in line), printed
    return found


def test_decoding_prints_speeds_and_ratios():
    sizes = ("--rounds", "1", "--context", "16", "--new-tokens", "32", "--shapes", "vicuna-7b, 8 of 32 layers")
    printed = run("decoding.py", "--tiny", *sizes)
    for row in ("prefill", "decode"):
        ((ours, theirs, ratio),) = figures(printed, row)
        assert min(ours, theirs, ratio) > 0
    assert re.search(r"^decoding reads its weights at \d+% of", printed, re.M)


def test_loading_prints_seconds_memory_and_ratio():
    printed = run("loading.py", "--tiny", "--rounds", "1")
    for row in ("minivlm", "transformers"):
        ((_seconds, _gigabytes),) = figures(printed, row)
    assert figures(printed, "ratio")[0][0] > 0


def test_ops_prints_a_row_for_every_op_dtype_and_shape():
    printed = run("ops.py", "--rounds", "1", "--tokens", "8")
    shapes = {"rms_norm": 2, "add_rms_norm": 2, "apply_rope": 3, "patch_merge": 1, "patchify": 1}
    for op, count in shapes.items():
        rows = figures(re.sub(r"\d+ x \S+( x \d+)?", "", printed), op)
        assert len(rows) == 2 * count  # in bfloat16 and float32
        for _microseconds, *ratios, _share in rows:
            assert len(ratios) == 1 + (op == "rms_norm") and min(ratios) > 0  # eager; F.rms_norm


def test_text_only_prints_that_less_is_read():
    printed = run("text_only.py", "--tiny")
    (whole, _), (text, _) = figures(printed, "whole")[0], figures(printed, "text only")[0]
    assert whole > text > 0


def test_vision_prints_both_tables():
    shapes = ("--shapes", "qwen2-vl 448", "--shapes", "memory")
    printed = run("vision.py", "--tiny", "--rounds", "1", "--layers", "1", *shapes)
    speed, memory = figures(printed, "qwen2-vl 448")
    assert len(speed) == 5 and speed[-1] > 0 and len(memory) == 2
    assert figures(printed, "peak:")[0][0] > 0
