"""Qwen2-VL's sizes and settings, prompts, configs, and every layout of its checkpoints."""

import json

import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from qwen2_vl_tiny import CONFIG, END, IMAGE, PICTURES, PREPROCESSOR, START, ask, by_cell, film, opened  # fmt: skip
from tiny import load, picture, turn
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from minivlm import Prompt
from minivlm.errors import MinivlmError
from minivlm.models import qwen2_vl_patches
from minivlm.models.qwen2_vl import Qwen2VLConfig

# --- sizes and settings -----------------------------------------------------------------------------------------------

sides = st.integers(1, 4000)


@given(height=sides, width=sides, least=st.integers(1, 4000), more=st.integers(0, 30000))
@example(height=42, width=70, least=1, more=100)  # 1.5 and 2.5 cells both become 2
def test_sizes_equal_transformers(height, width, least, more):
    """Limits from 1 token to 30,000, in cells of 28 × 28."""
    limits = least * 784, (least + more) * 784
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(MinivlmError, match="200 times"):
            qwen2_vl_patches.smart_resize((height, width), 28, *limits)
        return
    assert qwen2_vl_patches.smart_resize((height, width), 28, *limits) == smart_resize(height, width, 28, *limits)


@given(height=st.integers(1, 90), width=st.integers(1, 90), most=st.integers(4, 40))
def test_a_picture_becomes_a_quarter_of_its_patches(height, width, most):
    _, vlm = opened()
    inputs = vlm.preprocess([[turn("user", picture(height, width), "What?")]], images_kwargs={"max_pixels": most * 64})
    (t, h, w) = inputs.image_grid_thw[0].tolist()
    count = int((inputs.input_ids == IMAGE).sum())
    assert count == t * h * w // 4 == len(inputs.pixel_values) // 4
    with torch.inference_mode():
        assert len(vlm.model.encode_images(inputs)) == count


def grid_of(vlm, size, options=None, images_kwargs=None):
    part = {"type": "image", "image": picture(*size), **(options or {})}
    return vlm.preprocess([ask(part, "What?")], images_kwargs=images_kwargs).image_grid_thw[0].tolist()


def test_limits_come_from_the_part_the_call_or_the_folder():
    _, vlm = opened()
    assert grid_of(vlm, (160, 160)) == [1, 14, 14]  # 60 tokens at most: 7 × 7
    assert grid_of(vlm, (160, 160), images_kwargs={"max_pixels": 16 * 64}) == [1, 8, 8]
    new_names = {"size": {"shortest_edge": 4 * 64, "longest_edge": 16 * 64}}
    assert grid_of(vlm, (160, 160), images_kwargs=new_names) == [1, 8, 8]
    assert grid_of(vlm, (160, 160), {"max_pixels": 9 * 64}, {"max_pixels": 16 * 64}) == [1, 6, 6]
    assert grid_of(vlm, (8, 8), {"min_pixels": 25 * 64}) == [1, 10, 10]
    assert grid_of(vlm, (160, 160), {"resized_height": 17, "resized_width": 40}) == [1, 4, 10]
    assert grid_of(vlm, (16, 32), images_kwargs={"do_resize": False}) == [1, 4, 8]


@pytest.mark.parametrize("part, images_kwargs, said", [
    ({"image": picture(1, 201)}, {}, "200 times"),
    ({"image": picture(8, 8), "max_pixel": 99}, {}, "'max_pixel'"),
    ({"image": picture(8, 8), "min_pixels": 0}, {}, "min_pixels"),
    ({"image": picture(8, 8), "max_pixels": 64}, {}, "more than max_pixels"),
    ({"image": picture(8, 8), "resized_height": 64}, {}, "together"),
    ({"image": picture(8, 8), "resized_height": True, "resized_width": 8}, {}, "in pixels"),
    ({"image": picture(8, 8), "resized_height": 10**400, "resized_width": 10**400}, {}, "in pixels"),
    ({"image": picture(8, 8), "min_pixels": 10**400, "max_pixels": 10**401}, {}, "min_pixels"),
    ({"image": picture(9, 8)}, {"do_resize": False}, "multiples of 8"),
    ({"image": picture(8, 8)}, {"size": {"height": 8, "width": 8}}, "area"),
    ({"image": picture(8, 8)}, {"merge_size": 1}, "merge_size 1"),
    ({"image": picture(8, 8)}, {"do_pad": True}, "do_pad"),
    ({"image": picture(8, 8)}, {"do_center_crop": True}, "neither crops"),
    ({"video": "film.mp4"}, {}, "film.mp4: no such file"),
    ({"video": []}, {}, "at least one frame"),
    ({"video": [picture(8, 8), picture(80, 9)]}, {}, "differ in size"),
    ({"video": [picture(8, 8)], "num_frames": 3}, {}, "3 frames were asked for"),
    ({"video": [picture(8, 8)], "fps": 2, "num_frames": 1}, {}, "not by both"),
    ({"video": [picture(8, 8)], "frames": 3}, {}, "'frames'.*known here: min_pixels.*fps"),
    ({"video": [picture(8, 8)], "min_pixels": "many"}, {}, "min_pixels"),
    ({"video": [picture(8, 8)], "min_pixels": 128, "max_pixels": 64}, {}, "more than max_pixels"),
    ({"video": [picture(8, 8)]}, {"merge_size": 1}, "merge_size 1"),
    ({"video": [picture(8, 8)]}, {"min_pixels": 128, "max_pixels": 64}, "more than max_pixels"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(part, images_kwargs, said):
    _, vlm = opened()
    kind = "image" if "image" in part else "video"
    with pytest.raises(MinivlmError, match=said) as caught:
        vlm.preprocess([ask({"type": kind, **part}, "What?")], images_kwargs=images_kwargs)
    assert "\n" not in str(caught.value)


def test_a_silent_preprocessor_is_transformers_default(tmp_path):
    checkpoint, _ = opened()
    images = load(tiny.variant(checkpoint.folder, tmp_path / "bare", drop=["preprocessor*"])).processor.images.pictures
    theirs = Qwen2VLImageProcessorPil()
    assert (images.min_pixels, images.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert images.resample == theirs.resample


@pytest.mark.parametrize("settings", [
    {"size": {"shortest_edge": 256, "longest_edge": 3840}},
    {"size": {"min_pixels": 1, "max_pixels": 64}, "min_pixels": 256, "max_pixels": 3840},
], ids=["5.x", "4.45"])  # fmt: skip
def test_every_spelling_of_the_limits_is_read(tmp_path, settings):
    checkpoint, vlm = opened()
    folder = tiny.variant(checkpoint.folder, tmp_path / "other")
    rest = {key: value for key, value in PREPROCESSOR.items() if not key.endswith("pixels")}
    tiny.write_json(folder / "preprocessor_config.json", rest | settings)
    assert load(folder).processor.images == vlm.processor.images


@pytest.mark.parametrize("change", [
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 0.013},
    {"image_mean": [0.1, 0.2, 0.3]},
    {"image_std": [0.4, 0.5, 0.6]},
    {"resample": 2},
], ids=lambda change: " ".join(change))  # fmt: skip
def test_every_setting_of_the_pixels_is_heeded_to_the_last_bit(change):
    _, vlm = opened()
    plain, ours = (
        vlm.preprocess([ask({"type": "image", "image": picture(47, 91)}, "What?")], images_kwargs=kwargs)
        for kwargs in ({}, change)
    )
    theirs = Qwen2VLImageProcessorPil(**PREPROCESSOR | change)(picture(47, 91), return_tensors="pt")["pixel_values"]
    assert torch.equal(by_cell(ours.pixel_values, ours.image_grid_thw), theirs)
    assert not torch.equal(ours.pixel_values, plain.pixel_values)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_by_hand(tmp_path):
    checkpoint, _ = opened()
    vlm = load(tiny.variant(checkpoint.folder, tmp_path / "bare", drop=["chat_template*"]))
    talk = ask(picture(16, 16), film(1), "Hm?")
    shown = vlm.processor.tokenizer.decode(vlm.preprocess([talk]).input_ids[0].tolist(), skip_special=False)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image = f"<|vision_start|>{4 * '<|image_pad|>'}<|vision_end|>"
    video = f"<|vision_start|>{15 * '<|video_pad|>'}<|vision_end|>"
    start = "<|im_start|>user\n"
    end = "Hm?<|im_end|>\n<|im_start|>assistant\n"
    assert shown == system + start + image + video + end
    numbered = vlm.preprocess([talk], template_kwargs={"add_vision_id": True}).input_ids[0].tolist()
    shown = vlm.processor.tokenizer.decode(numbered, skip_special=False)
    assert shown == system + start + f"Picture 1: {image}Video 1: {video}" + end
    own = [turn("system", "Be brief."), *talk]
    shown = vlm.processor.tokenizer.decode(vlm.preprocess([own]).input_ids[0].tolist(), skip_special=False)
    assert shown == "<|im_start|>system\nBe brief.<|im_end|>\n" + start + image + video + end


def test_a_rendered_prompt_and_labels():
    _, vlm = opened()
    text = "<|vision_start|><|image_pad|><|vision_end|>A photo of"
    ids = vlm.preprocess([Prompt(text, images=[picture(16, 16)])]).input_ids[0].tolist()
    assert ids[:6] == [START, IMAGE, IMAGE, IMAGE, IMAGE, END]
    inputs = vlm.preprocess([PICTURES[2]], labels=True)
    answer = inputs.labels[inputs.labels >= 0].tolist()
    assert vlm.processor.tokenizer.decode(answer).strip() == "The left one."


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantised_checkpoints_are_refused(tmp_path, method):
    checkpoint, _ = opened()
    folder = tiny.variant(checkpoint.folder, tmp_path / "q", {"quantization_config": {"quant_method": method}})
    with pytest.raises(MinivlmError, match=f"{method}.*quantised from"):
        load(folder)


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sparse", [{}, {"text_config": {"vocab_size": 99}}, {"use_sliding_window": True}, CONFIG], ids=str
)
def test_what_a_config_leaves_out_is_what_transformers_takes(sparse):
    rest = {key: value for key, value in sparse.items() if key != "model_type"}
    theirs = AutoConfig.for_model("qwen2_vl", **json.loads(json.dumps(rest)))
    again = Qwen2VLConfig.from_hf(json.loads(json.dumps(theirs.to_dict())))
    assert Qwen2VLConfig.from_hf(sparse) == again


def test_sections_that_do_not_fit_the_heads_are_refused():
    """The published ones, for heads of 12."""
    with pytest.raises(MinivlmError, match="mrope_section"):
        Qwen2VLConfig.from_hf(CONFIG | {"rope_scaling": {"type": "default"}})
