"""The Python face, on the bundled model: real answers, offline."""

import json
import shutil

import numpy as np
import pytest
import torch
from onevision_tiny import film, opened
from PIL import Image
from tiny import picture

import minivlm
from minivlm import MinivlmError, Prompt
from minivlm.demo import DEMO_CHECKPOINT, DEMO_PICTURE
from minivlm.demo.world import BUNDLED, HELD_OUT_SEEDS, PICTURES, draw_scene, questions, render
from minivlm.vlm import pick_device, pick_dtype, stop_ids, told_dtype

FLOOR = 0.85  # share of the sample's questions that the shipped weights must answer to the letter; they reach 0.93


def ask(text, *pictures):
    parts = [{"type": "image", "image": str(picture)} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def vlm():
    return minivlm.load(DEMO_CHECKPOINT, device="cpu", dtype="float32")


def test_the_bundled_model_is_as_good_as_the_readme_says(vlm):
    """A small sample of `python -m minivlm.demo.evaluate`: a broken seam between picture and answer halves it."""
    asked, batch = [], []
    for seed in HELD_OUT_SEEDS[:16]:
        scene = draw_scene(seed)
        for question in questions(scene, seed)[::3]:
            parts = [{"type": "image", "image": render(scene)}, {"type": "text", "text": question.question}]
            batch.append([{"role": "user", "content": parts}])
            asked.append(question)
    results = vlm.generate(batch, max_new_tokens=64)
    right = sum(result.text == question.answer for result, question in zip(results, asked, strict=True))
    assert right / len(asked) >= FLOOR, f"{right} of {len(asked)}"


def test_the_model_looks(vlm):
    answers = {vlm.chat("Describe the picture.", [PICTURES / name]) for name in BUNDLED}
    assert len(answers) == len(BUNDLED)


def test_stream_says_what_generate_says(vlm):
    messages = ask("Describe the picture.", DEMO_PICTURE)
    stream = vlm.stream(messages)
    pieces = list(stream)
    result = vlm.generate(messages)
    assert len(pieces) > 5 and "".join(pieces) == result.text == stream.result.text
    assert stream.result.token_ids == result.token_ids


def test_a_result_tells_what_happened(vlm):
    result = vlm.generate(ask("Describe the picture.", DEMO_PICTURE))
    assert result.finish_reason == "stop" and result.token_ids[-1] in vlm.eos_ids
    assert result.prompt_tokens == vlm.preprocess([ask("Describe the picture.", DEMO_PICTURE)]).input_ids.shape[1]
    assert {"first_token_seconds", "total_seconds", "tokens_per_second"} <= result.stats.keys()
    short = vlm.generate(ask("Describe the picture.", DEMO_PICTURE), max_new_tokens=3)
    assert short.finish_reason == "length" and len(short.token_ids) == 3


def test_a_batch_answers_as_its_rows_do_alone(vlm):
    batch = [ask("Describe the picture.", picture) for picture in sorted(PICTURES.glob("*.png"))[:3]]
    batch += [ask("Which is larger?"), Prompt("<|im_start|>user\n<image>\nHow many", images=[DEMO_PICTURE])]
    together = [result.text for result in vlm.generate(batch, max_new_tokens=24)]
    assert together == [vlm.generate(messages, max_new_tokens=24).text for messages in batch]


def test_pictures_may_be_paths_or_images(vlm):
    assert vlm.chat("Describe it.", [DEMO_PICTURE]) == vlm.chat("Describe it.", [Image.open(DEMO_PICTURE)])


def test_chat_shows_films_behind_pictures():
    vlm, frames = opened()[1], film(3)
    parts = [("image", picture(9, 9)), ("video", frames), ("text", "What?")]
    talk = [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in parts]}]
    expected = vlm.generate(talk, max_new_tokens=4).text
    assert vlm.chat("What?", [picture(9, 9)], [frames], max_new_tokens=4) == expected
    assert vlm.chat("What?", [picture(9, 9)], [film(3, seed=1)], max_new_tokens=4) != expected
    with pytest.raises(MinivlmError, match="into the messages"):
        vlm.chat(talk, videos=[frames])


def test_one_picture_or_film_is_given_in_a_list():
    """A path is a list of letters, an array one of frames: neither is what was meant."""
    vlm, frames = opened()[1], np.zeros((3, 9, 9, 3), np.uint8)
    for ask_wrongly in (
        lambda: vlm.chat("What?", "cat.jpg"),
        lambda: vlm.chat("What?", videos=frames),
        lambda: Prompt("<image>", "cat.jpg"),
        lambda: Prompt("<video>", videos=frames),
    ):
        with pytest.raises(MinivlmError, match="(images|videos)= is a list"):
            ask_wrongly()


def test_images_kwargs_reach_the_processor(vlm):
    with_tiles = vlm.preprocess([ask("Hm?", DEMO_PICTURE)])
    without = vlm.preprocess([ask("Hm?", DEMO_PICTURE)], images_kwargs={"image_grid_pinpoints": [[72, 72]]})
    assert with_tiles.image_grids.tolist() == [[2, 2]] and without.image_grids.tolist() == [[1, 1]]
    assert torch.isfinite(vlm.model(without)).all()


def test_labels_stand_on_answers_alone(vlm):
    talk = [*ask("Colour?", DEMO_PICTURE), {"role": "assistant", "content": "red"}]
    inputs = vlm.preprocess([talk], labels=True)
    said = inputs.labels[0][inputs.labels[0] >= 0]
    assert vlm.processor.tokenizer.decode(said.tolist(), skip_special=False) == "red<|im_end|>"


def test_saved_and_loaded_again_it_is_the_same_model(vlm, tmp_path):
    vlm.save(tmp_path)
    again = minivlm.load(tmp_path, device="cpu", dtype="float32")
    ours, theirs = vlm.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.chat("Describe it.", [DEMO_PICTURE]) == vlm.chat("Describe it.", [DEMO_PICTURE])


def test_without_vision_the_tower_is_never_read():
    text_only = minivlm.load(DEMO_CHECKPOINT, device="cpu", dtype="float32", vision=False)
    assert all(p.is_meta for p in text_only.model.vision_tower.parameters())
    assert not any(p.is_meta for p in text_only.model.language_model.parameters())
    assert isinstance(text_only.chat("Hello?", max_new_tokens=4), str)
    with pytest.raises(MinivlmError, match="without its vision"):
        text_only.chat("What is this?", [DEMO_PICTURE])


@pytest.mark.parametrize("missing", ["vision", "weights"])
def test_what_was_not_read_cannot_be_saved(tmp_path, missing):
    vlm = minivlm.load(DEMO_CHECKPOINT, **{missing: False})
    with pytest.raises(MinivlmError, match="cannot be saved"):
        vlm.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_without_weights_shapes_can_be_asked_for():
    empty = minivlm.load(DEMO_CHECKPOINT, weights=False)
    assert all(p.is_meta for p in empty.model.parameters())
    assert empty.dtype in (torch.bfloat16, torch.float32), "float16 on disk is neither computed nor counted in on a CPU"
    assert minivlm.load(DEMO_CHECKPOINT, weights=False, dtype="float16").dtype == torch.float16
    assert empty.preprocess([ask("Hm?", DEMO_PICTURE)]).input_ids.shape[1] > 100


def test_an_unknown_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(MinivlmError, match="'blip'.*llava"):
        minivlm.load(tmp_path)


def test_device_and_dtype_are_chosen_or_refused():
    assert pick_dtype("float16", torch.device("cpu"), torch.float32) == torch.float16
    assert pick_dtype(torch.float64, torch.device("cpu"), torch.float32) == torch.float64
    assert pick_dtype("auto", torch.device("cpu"), torch.float16) in (torch.bfloat16, torch.float32)
    assert pick_dtype("auto", torch.device("cuda"), torch.float16) == torch.float16
    with pytest.raises(MinivlmError, match="float8"):
        pick_dtype("float8", torch.device("cpu"), torch.float32)
    with pytest.raises(MinivlmError, match="device"):
        pick_device("toaster")


def test_the_dtype_that_a_config_tells_is_found_in_every_place():
    assert told_dtype({"torch_dtype": "bfloat16"}) == told_dtype({"dtype": "bfloat16"}) == torch.bfloat16
    assert told_dtype({"text_config": {"torch_dtype": "float16"}}) == torch.float16
    assert told_dtype({}) == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_cuda_without_a_gpu_is_one_clear_line():
    with pytest.raises(MinivlmError, match="no CUDA GPU"):
        minivlm.load(DEMO_CHECKPOINT, device="cuda")


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
        ({}, {"eos_token_id": 7}, (7,)),
        (None, {"text_config": {"eos_token_id": 8}}, (8,)),
        (None, {}, (9,)),
    ],
)
def test_stop_ids_come_from_the_first_place_that_knows(tmp_path, generation, config, expected):
    class Nine:
        eos_id = 9

    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_ids(tmp_path, config, Nine()) == expected


def test_a_moved_folder_works(tmp_path):
    """Nothing is decided by a path: the folder's name says nothing."""
    folder = tmp_path / "mllama-qwen2-vl"
    shutil.copytree(DEMO_CHECKPOINT, folder)
    assert type(minivlm.load(folder).model).__module__ == "minivlm.models.llava_next"
