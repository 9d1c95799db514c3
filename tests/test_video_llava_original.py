"""The original Video-LLaVA: against the same weights in the hub's layout, and against that repository's rules."""

import json

import numpy as np
import pytest
import tiny
import tokenizers_tiny
import torch
from films import decode, write_film
from PIL import Image
from tiny import close, film, load, our_logits, picture, their_logits, turn
from transformers import VideoLlavaForConditionalGeneration
from video_llava_tiny import CONFIG, TOKENIZER, of_inputs, opened

from minivlm import Prompt
from minivlm.errors import MinivlmError
from minivlm.images import to_pixels
from minivlm.models import video_llava_original

BASE = TOKENIZER.get_vocab_size()  # rows of the table, as 32000 in the published one
MM = {
    "image_aspect_ratio": "pad", "mm_hidden_size": 32, "mm_image_tower": "./image", "mm_video_tower": "./video",
    "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "tune_mm_mlp_adapter": False,
    "use_mm_proj": True, "X": ["Video", "Image"],
}  # fmt: skip
RENAMED = (  # the hub's names → the original's
    ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
    ("image_tower.vision_model.", "model.image_tower.image_tower."),
    ("video_tower.vision_model.", "model.video_tower.video_tower."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
)  # fmt: skip


def write(folder, towers=({}, {}), more=(), **changes):
    """The weights of `opened()` as LanguageBind laid them out: two .bin shards, without rows for new tokens."""
    folder.mkdir(parents=True)
    tokenizers_tiny.save(TOKENIZER, folder, "llama", pad_token="<unk>")
    text = {key: value for key, value in CONFIG["text_config"].items() if key != "model_type"}
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "vocab_size": BASE}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **text, **MM, **changes}
    tiny.write_json(folder / "config.json", config)
    for name, kind, changed in zip(("image", "video"), ("Image", "Video"), towers, strict=True):
        (folder / name).mkdir()
        vision = tiny.CLIP | {"add_time_attn": False, "num_frames": 8} | changed
        tower = {"model_type": f"LanguageBind{kind}", "vision_config": vision}
        tiny.write_json(folder / name / "config.json", tower)
    tensors = {"model.image_tower.image_tower.embeddings.position_ids": torch.arange(26)[None], **dict(more)}
    for name, tensor in tiny.tensors_of(opened()[0].theirs).items():
        old, new = next(pair for pair in RENAMED if name.startswith(pair[0]))
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        tensors[new + name.removeprefix(old)] = tensor[:BASE].clone() if is_table else tensor
    where = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    tiny.write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": where})
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return load(write(tmp_path_factory.mktemp("video_llava") / "original"))


# --- the same weights, the same logits --------------------------------------------------------------------------------


def test_logits_equal_the_hub_layout_s(original):
    """Where both process alike: pictures and frames of the towers' own size."""
    _, hub = opened()
    prompts = [
        Prompt("USER: <image>\nWhat? ASSISTANT:", images=[picture(40, 40)]),
        Prompt("USER: <image><video>\nWhat? ASSISTANT:", images=[picture(40, 40)], videos=[film(8, 40, 40)]),
        Prompt("Hello"),
    ]
    theirs, ours = hub.preprocess(prompts), original.preprocess(prompts)
    assert close(ours.pixel_values, theirs.pixel_values, atol=1e-6)
    assert close(ours.pixel_values_videos, theirs.pixel_values_videos, atol=1e-6)
    assert close(our_logits(original, ours), our_logits(hub, theirs)[:, :BASE], atol=1e-5)


def test_a_saved_original_is_a_hub_checkpoint(original, tmp_path):
    original.save(tmp_path / "saved")
    again, talk = load(tmp_path / "saved"), [[turn("user", picture(50, 91), film(8), "What?")]]
    ours, once_more = original.preprocess(talk), again.preprocess(talk)
    assert torch.equal(ours.input_ids, once_more.input_ids)
    assert torch.equal(ours.pixel_values_videos, once_more.pixel_values_videos)
    assert torch.equal(ours.pixel_values, once_more.pixel_values)
    logits = our_logits(original, ours)
    model = VideoLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    theirs = their_logits(model, of_inputs(ours))
    assert close(logits, theirs[:, :BASE])
    assert (theirs[:, BASE:].amax(1) < logits.amax(1)).all()  # rows that are only there for placeholders are never said
    settings = json.loads((tmp_path / "saved/preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "VideoLlavaImageProcessor"


# --- prompts ----------------------------------------------------------------------------------------------------------

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def test_prompts_are_the_original_s(original):
    """Placeholders stand in their order, and one newline behind them, as its cli.py joins them."""
    talk = [
        turn("user", film(8), picture(9, 9), "What is this?"), turn("assistant", "A star."), turn("user", "Sure?"),
    ]  # fmt: skip
    text, tokenizer = original.processor.template.render(talk, True), original.processor.tokenizer
    assert text == f"{SYSTEM} USER: <video><image>\nWhat is this? ASSISTANT: A star.</s>USER: Sure? ASSISTANT:"
    ids = original.preprocess([talk]).input_ids[0].tolist()
    video, image = (tokenizer.token_to_id(token) for token in ("<video>", "<image>"))
    start = ids.index(video)
    assert ids[start : start + 233] == [video] * 208 + [image] * 25
    assert ids.count(video) == 208 and ids.count(image) == 25


# --- pixels: the original's rules, written down slowly ----------------------------------------------------------------

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def weights(t, cubic):
    """{offset: share} of the pixels around a place `t` in [0, 1) behind pixel 0; cubic with a = -0.75."""
    if not cubic:
        return {0: 1 - t, 1: t}

    def share(d):
        d, a = abs(d), -0.75
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)

    return {offset: share(t - offset) for offset in (-1, 0, 1, 2)}


def slow_line(old, new, cubic):
    """Matrix (new, old) that resizes one axis: what lies outside is the pixel at the edge."""
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        if not cubic:
            place = max(place, 0)
        first = int(np.floor(place))
        for offset, share in weights(place - first, cubic).items():
            matrix[i, min(max(first + offset, 0), old - 1)] += share
    return matrix


def slow_pixels(image, cubic):
    x = np.asarray(image) / 255
    height, width = x.shape[:2]
    size = (int(40 * height / width), 40) if width <= height else (40, int(40 * width / height))
    rows, columns = slow_line(height, size[0], cubic), slow_line(width, size[1], cubic)
    x = np.einsum("ih,hwc,jw->ijc", rows, x, columns, optimize=True)
    top, left = (round((side - 40) / 2) for side in size)
    x = (x[top : top + 40, left : left + 40] - MEAN) / STD
    return torch.from_numpy(x.transpose(2, 0, 1)).float()


def slow_square(image):
    """In the middle of a square of the mean colour."""
    width, height = image.size
    edge = max(width, height)
    canvas = np.empty((edge, edge, 3), np.uint8)
    canvas[:] = (122, 116, 104)
    top, left = (edge - height) // 2, (edge - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(image)
    return Image.fromarray(canvas)


SIZES = [(40, 40), (39, 43), (91, 47), (47, 91), (200, 41), (1, 1), (7, 5), (160, 160), (40, 43)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_the_original_s(original, size):
    image = picture(*size)
    inputs = original.preprocess([Prompt("<image><video>", images=[image], videos=[[image]])])
    assert close(inputs.pixel_values[0], slow_pixels(slow_square(image), cubic=True))
    assert close(inputs.pixel_values_videos[0], slow_pixels(image, cubic=False))


def test_pictures_are_not_padded_where_the_config_does_not_pad(tmp_path):
    vlm, image = load(write(tmp_path / "square", image_aspect_ratio=None)), picture(47, 91)
    assert close(vlm.preprocess([Prompt("<image>", [image])]).pixel_values[0], slow_pixels(image, cubic=True))


def test_pillow_s_resize_gives_other_pixels(original):
    """The twin: were frames resized as the conversion does it, one would see it."""
    image = picture(160, 200)
    ours = original.preprocess([Prompt("<video>", videos=[[image]])]).pixel_values_videos[0]
    assert not close(ours, to_pixels(image, opened()[1].processor.images), atol=0.1)


def test_frames_are_not_mirrored_by_chance(original):
    talk = [[turn("user", film(8), "What?")]]
    first = original.preprocess(talk).pixel_values_videos
    assert all(torch.equal(original.preprocess(talk).pixel_values_videos, first) for _ in range(8))


def test_the_first_and_the_last_frame_of_a_file_are_taken(original, tmp_path):
    path = write_film(tmp_path / "film.mp4", 21)
    frames = decode(path)
    wanted = [frames[i] for i in np.linspace(0, 20, 8, dtype=int)]
    ours, theirs = (original.preprocess([Prompt("<video>", videos=[source])]) for source in (path, wanted))
    assert torch.equal(ours.pixel_values_videos, theirs.pixel_values_videos)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "marks": ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; minivlm knows False"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; minivlm knows pad or square"),
    "no image tower": ({"mm_image_tower": None}, "mm_image_tower and mm_video_tower must name the two towers"),
    "another projector": ({"mm_projector_type": "qformer"}, "mm_projector_type"),
    "towers of two shapes": ({"towers": ({}, {"hidden_act": "gelu"})}, "not of one shape"),
    "attention between frames": (
        {"more": {"model.video_tower.video_tower.encoder.layers.0.temporal_embedding": torch.ones(1, 8, 32)}},
        "temporal_embedding",
    ),
    "a tower that is nowhere": ({"mm_video_tower": "./elsewhere"}, "elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_minivlm_does_not_know_is_refused(tmp_path, name):
    changes, told = REFUSED[name]
    with pytest.raises(MinivlmError, match=told) as error:
        load(write(tmp_path / "original", **changes))
    assert "\n" not in str(error.value)


def test_image_settings_are_refused(original):
    with pytest.raises(MinivlmError, match="no image settings"):
        original.preprocess([Prompt("<image>", [picture(9, 9)])], images_kwargs={"resample": 2})


def test_a_thread_of_a_frame_is_refused(original):
    with pytest.raises(MinivlmError, match="crop it first"):
        original.preprocess([Prompt("<video>", videos=[[Image.new("RGB", (60_000, 1))]])])


def test_sizes_of_the_towers_are_read_from_their_own_place(tmp_path):
    towers = ({"hidden_act": "gelu"}, {"hidden_act": "gelu"})
    vlm = load(write(tmp_path / "original", towers=towers))
    assert vlm.model.config.llava.vision.hidden_act == "gelu"
    assert set(video_llava_original.KEYS) <= {
        *vlm.keys,
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
    }
