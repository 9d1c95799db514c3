"""Films on the command line, through every family that takes them: which frames, at what cost, by which road."""

import io
import json
import re

import onevision_tiny
import pytest
import qwen2_vl_tiny
import video_llava_tiny
from films import write_film

from minivlm import run
from minivlm.demo.world import PICTURES


@pytest.fixture
def answered(capsys):
    """What the command says, in this process: (stdout, stderr)."""

    def answered(*argv):
        assert run.main(list(argv)) == 0
        return capsys.readouterr()

    return answered


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two seconds, 48 frames."""
    return str(write_film(tmp_path_factory.mktemp("films") / "film.mp4", 48, rate=24))


FAMILIES = {"qwen2_vl": qwen2_vl_tiny, "llava_onevision": onevision_tiny, "video_llava": video_llava_tiny}


@pytest.mark.parametrize(("flags", "indices"), [([], None), (["--num-frames", "6"], 6), (["--fps", "4"], 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_dry_run_tells_the_frames_and_what_they_cost(answered, film, family, flags, indices):
    folder = str(FAMILIES[family].opened()[0].folder)
    out, _ = answered("--dry-run", "--ckpt", folder, "--video", film, "-p", "What happens?", *flags)
    taken = indices or (4 if family == "qwen2_vl" else 8)  # two a second there
    numbers = [48 // taken * number for number in range(taken)]
    first, frames, seconds = out[out.index("film 1") :].splitlines()[:3]
    assert first.startswith(f"film 1: {taken} of 48 frames, ")
    assert frames == f"    frames {', '.join(map(str, numbers))}"
    assert seconds == f"    shown at {', '.join(f'{number / 24:.2f}' for number in numbers)} s"
    ids = json.loads(
        answered("--json", "--ckpt", folder, "--video", film, "-p", "What happens?", "--max-new-tokens", "1", *flags)[0]
    )["prompt_token_ids"]
    assert f", {max(map(ids.count, ids)):,} tokens" in first


@pytest.mark.parametrize("family", FAMILIES)
def test_films_travel_by_every_road(answered, film, tmp_path, family, monkeypatch):
    """The flag, a file of messages, a batch and a conversation give one answer."""
    common = ["--ckpt", str(FAMILIES[family].opened()[0].folder), "--max-new-tokens", "4"]
    told, _ = answered(*common, "--video", film, "--num-frames", "4", "-p", "What happens?")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": film, "num_frames": 4},
                {"type": "text", "text": "What happens?"},
            ],
        }
    ]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    assert answered(*common, "--messages", str(tmp_path / "m.json"))[0] == told
    row = {"prompt": "What happens?", "videos": [film], "num_frames": 4}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"messages": messages}) + "\n")
    answered(*common, "--batch", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl"))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] + "\n" for line in lines] == [told, told]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/video {film}\nWhat happens?\n"))
    assert answered(*common, "--chat", "--num-frames", "4")[0] == told


def test_show_prompt_counts_the_film_s_tokens(answered, film):
    folder = str(onevision_tiny.opened()[0].folder)
    _, err = answered("--show-prompt", "--ckpt", folder, "--video", film, "-p", "What?", "--max-new-tokens", "1")
    assert "<video>×" in err


def test_a_rendered_prompt_takes_films(answered, film):
    folder = str(qwen2_vl_tiny.opened()[0].folder)
    prompt = "<|vision_start|><|video_pad|><|vision_end|>What?"
    out, _ = answered("--dry-run", "--raw", "-p", prompt, "--ckpt", folder, "--video", film)
    assert out.startswith("<|vision_start|><|video_pad|>×") and "film 1: 4 of 48 frames, " in out


def test_films_side_by_side_share_one_count(answered, film):
    """No token stands between them in the prompt, so that the tokens of one cannot be told from the other's."""
    folder = str(video_llava_tiny.opened()[0].folder)
    films = ["--video", film, "--video", film]
    out, _ = answered("--dry-run", "--raw", "-p", "<video><video>What?", "--ckpt", folder, *films)
    assert "film 1: 8 of 48 frames\n" in out and "film 2: 8 of 48 frames\n" in out
    assert re.search(r"<video>×(\d+) What.*^all films: \1 tokens$", out, re.DOTALL | re.MULTILINE)


def test_a_model_without_films_says_so(capsys, film):
    assert run.main(["--video", film]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "minivlm: this model takes pictures only; give it a film's frames as pictures"


def test_limits_of_pixels_are_those_of_pictures_and_frames(answered, film):
    """In cells of 8 × 8 pixels: 16 of a square picture, and 12 of each frame pair."""
    seen = ["--ckpt", str(qwen2_vl_tiny.opened()[0].folder), "--image", str(PICTURES / "shapes.png"), "--video", film]
    out, err = answered("--dry-run", *seen, "--max-pixels", "1024")
    assert "<|image_pad|>×16<" in out and "film 1: 4 of 48 frames, 24 tokens" in out
    assert err == "minivlm: no --prompt: Describe the picture.\n"  # nothing was shrunk without being asked for
    assert run.main(["--max-pixels", "1024"]) == 1  # the demo model has no such limit
