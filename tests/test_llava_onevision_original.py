"""Original LLaVA-OneVision checkpoints: against the same weights in the hub's layout, and against their own rules."""

import json
import math

import av
import numpy as np
import pytest
import tiny
import tokenizers_tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from onevision_tiny import PINPOINTS, opened
from safetensors.torch import load_file
from test_published import CONFIGS, num_bytes, ours, shapes
from tiny import close, film, load, our_logits, picture, turn

from minivlm import MinivlmError, Prompt
from minivlm.images import anyres_grid
from minivlm.models import llava_original
from minivlm.models.llava_onevision import LlavaOnevisionConfig, arrange, num_image_tokens
from minivlm.models.llava_onevision_original import in_pixels, to_hub, tower_sizes

MM = {
    "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)", "image_crop_resolution": None, "image_split_resolution": None,
    "mm_hidden_size": 32, "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None, "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "./siglip", "tokenizer_padding_side": "right", "use_mm_proj": True, "torch_dtype": "bfloat16",
    "use_pos_skipping": False, "image_token_index": 7, "vision_tower_pretrained": None,
}  # fmt: skip


def original(folder, kind="0.5b", tower="inside", **changes):
    """`opened(kind)` as the original repository lays it out; `tower`: inside or outside of the checkpoint."""
    checkpoint, _ = opened(kind)
    hub = json.loads((checkpoint.folder / "config.json").read_text())
    folder.mkdir(parents=True)
    tokenizer = tokenizers_tiny.qwen2(added=())
    rows = tokenizer.get_vocab_size()
    words = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"  # the text model's own
    tokenizers_tiny.save(tokenizer, folder, "qwen2", chat_template=words)
    text = {key: value for key, value in hub["text_config"].items() if key != "model_type"} | {"vocab_size": rows}
    eos = tokenizer.token_to_id("<|im_end|>")
    config = text | MM | {"eos_token_id": eos, "tie_word_embeddings": hub["tie_word_embeddings"]} | changes
    tiny.write_json(folder / "config.json", config)
    sizes = tiny.SIGLIP | {"num_hidden_layers": tiny.SIGLIP["num_hidden_layers"] + 1}
    (folder / "siglip").mkdir()
    tiny.write_json(folder / "siglip" / "config.json", {"model_type": "siglip", "vision_config": sizes})
    own, seen = {}, {}
    for name, tensor in load_file(checkpoint.folder / "model.safetensors").items():
        name = name.removeprefix("language_model.").replace("image_newline", "model.image_newline")
        for i in (1, 2):
            name = name.replace(f"multi_modal_projector.linear_{i}", f"model.mm_projector.{2 * i - 2}")
        if name.startswith("vision_tower."):
            seen[name.removeprefix("vision_tower.")] = tensor
        else:
            own[name] = tensor[:rows].clone() if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor
    if tower == "inside":
        own |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in seen.items()}
    else:  # a whole SigLIP: its last layer, its head, its other half
        more = [name.replace("layers.3", "layers.4") for name in seen if "layers.3" in name]
        more += ["logit_scale", "logit_bias", "text_model.head.weight", "vision_model.head.probe"]
        tiny.save_tensors(seen | {name: torch.ones(3) for name in more}, folder / "siglip")
    tiny.save_tensors(own, folder)
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load(original(tmp_path_factory.mktemp("original") / "checkpoint"))


# --- the same weights, the same logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["inside", "outside"])
@pytest.mark.parametrize("kind", ["0.5b", "7b"])
def test_logits_equal_the_hub_layouts(tmp_path, kind, tower):
    """For pictures where both repositories process alike, with the conversion's mean and standard deviation."""
    hub, ours = opened(kind)[1], load(original(tmp_path / "original", kind, tower))
    settings = {key: getattr(hub.processor.images, key) for key in ("image_mean", "image_std")}
    prompts = [
        Prompt("<image>\nWhat?", images=[picture(47, 91)]), Prompt("Hello"),
        Prompt("<image><image> <video>?", images=[picture(9, 9), picture(40, 90)], videos=[film(2)]),
    ]  # fmt: skip
    theirs, inputs = hub.preprocess(prompts), ours.preprocess(prompts, images_kwargs=settings)
    assert torch.equal(inputs.input_ids, theirs.input_ids)
    for name in ("pixel_values", "pixel_values_videos", "image_grids", "video_sizes"):
        assert torch.equal(getattr(inputs, name), getattr(theirs, name))
    logits = our_logits(ours, inputs)
    assert torch.equal(logits, our_logits(hub, theirs)[:, : logits.shape[1]])


def test_a_saved_original_is_a_hub_checkpoint(vlm, tmp_path):
    vlm.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    talks = [[turn("user", picture(50, 91), film(2), "What?")], [turn("user", picture(9, 9), picture(40, 3), "And?")]]
    ours, other = vlm.preprocess(talks), again.preprocess(talks)
    assert torch.equal(ours.input_ids, other.input_ids)
    assert torch.equal(ours.pixel_values, other.pixel_values)
    logits = our_logits(vlm, ours)
    rows = logits.shape[1]
    assert torch.equal(our_logits(again, other)[:, :rows], logits)
    checkpoint, _ = opened()
    theirs = type(checkpoint.theirs).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    text = vlm.preprocess([[turn("user", "Hello!")]])
    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    assert close(tiny.their_logits(theirs, inputs)[:, :rows], our_logits(vlm, text))
    settings = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert (settings["num_image_tokens"], settings["vision_aspect_ratio"]) == (25, "anyres_max_9")


# --- prompts, pixels, frames ------------------------------------------------------------------------------------------


def test_the_prompt_is_the_originals(vlm):
    talk = [turn("user", picture(9, 9), film(1), "What?"), turn("assistant", "A cat."), turn("user", "Why?")]
    wanted = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\n<video>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    template, plain = vlm.processor.template, [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    assert template.render([{"role": "user", "content": plain}, *talk[1:]], True) == wanted
    brief = template.render([turn("system", "Be brief."), turn("user", "Why?")], True)
    assert brief.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n")
    labels = vlm.preprocess([talk[:2]], labels=True).labels
    assert vlm.processor.tokenizer.decode(labels[labels >= 0].tolist(), skip_special=False) == "A cat.<|im_end|>\n"


def slow_floats(image):
    """(pixel / 255 − 0.5) / 0.5, as their SigLipImageProcessor."""
    return torch.from_numpy((np.asarray(image) / 255 - 0.5) / 0.5).permute(2, 0, 1).float()


def test_pixels_are_the_originals(vlm):
    """A tie of pinpoints, which the first of (width, height) wins; the grey of padding; a squashed frame."""
    one, two, frame = picture(20, 20), picture(20, 43, 1), picture(30, 43, 2)
    alone = vlm.preprocess([Prompt("<image>", images=[one])])
    assert alone.image_grids.tolist() == [[1, 1]]
    assert close(alone.pixel_values[0], slow_floats(one.resize((43, 43), 3)), 1e-6)
    pair = vlm.preprocess([Prompt("<image><image>", images=[two, two])]).pixel_values[0]
    assert close(pair[:, 11:31], slow_floats(two), 1e-6)
    assert close(pair[:, 0, 0], torch.full((3,), (127 / 255 - 0.5) / 0.5), 1e-6)
    shown = vlm.preprocess([Prompt("<video>", videos=[[frame]])]).pixel_values_videos[0]
    assert close(shown, slow_floats(frame.resize((43, 43), 3)), 1e-6)


def test_a_grid_of_tiles_stands_upright_where_the_conversions_lies(tmp_path):
    points = "(2x1),(1x2)"  # (columns x rows): which of them fits a square is a tie
    prompt = [Prompt("<image>", images=[picture(60, 60)])]
    ours = load(original(tmp_path / "original", image_grid_pinpoints=points)).preprocess(prompt)
    theirs = opened()[1].preprocess(prompt, images_kwargs={"image_grid_pinpoints": [[86, 43], [43, 86]]})
    assert ours.image_grids.tolist() == [[1, 2]] and theirs.image_grids.tolist() == [[2, 1]]


def test_frames_are_spread_from_the_first_to_the_last(vlm, tmp_path):
    """Of 20 frames, each as bright as its number: linspace(0, 19, 8), where the conversion takes ⌊i · 20 / 8⌋."""
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * number, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    taken = {}
    for name, model in (("ours", vlm), ("theirs", opened()[1])):
        settings = {"image_mean": 0.0, "image_std": 1.0}
        inputs = model.preprocess([Prompt("<video>", videos=[str(path)])], images_kwargs=settings)
        taken[name] = (inputs.pixel_values_videos.mean((1, 2, 3)) * 255 / 12).round().int().tolist()
    assert taken == {"ours": np.linspace(0, 19, 8, dtype=int).tolist(), "theirs": [0, 2, 5, 7, 10, 12, 15, 17]}


# --- grids and tokens at the published size ---------------------------------------------------------------------------

REAL = LlavaOnevisionConfig.from_hf(to_hub(MM | {"vocab_size": 152064}, tower_sizes("", None), 151646, 151647))


def slow_count(width, height):
    """Their llava_arch.py: 729 + h · (w + 1), of the grid without its bars, shrunk where it is 1.1 times too large."""
    points = [(384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)]

    def merit(point):
        scale = min(point[0] / width, point[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - point[0] * point[1]

    across, down = (27 * (side // 384) for side in max(points, key=merit))
    if width / height > across / down:
        down -= (down - int(height * (across / width))) // 2 * 2
    else:
        across -= (across - int(width * (down / height))) // 2 * 2
    times = math.sqrt(down * across / (9 * 27**2))
    if times > 1.1:
        down, across = int(down // times), int(across // times)
    return 729 + down * (across + 1)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_tokens_are_the_originals(height, width):
    grid = anyres_grid((height, width), REAL.pinpoints, 384)
    assert num_image_tokens(REAL, (height, width), grid) == slow_count(width, height)
    tiles = torch.zeros(1 + math.prod(grid), 729, 1)
    assert len(arrange(tiles, grid, (height, width), torch.zeros(1), REAL)) == slow_count(width, height)


def test_rounding_first_would_be_seen():
    as_hub = LlavaOnevisionConfig.from_hf({})
    for size in ((369, 820), (423, 94), (738, 820)):
        grid = anyres_grid(size, REAL.pinpoints, 384)
        assert num_image_tokens(as_hub, size, grid) != num_image_tokens(REAL, size, grid)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_pinpoints_may_count_in_tiles():
    assert in_pixels("(1x1),...,(6x6)", 43) == PINPOINTS
    assert in_pixels("(1x2), (3x1)", 10) == [[10, 20], [30, 10]]
    assert in_pixels("(1x1),(1x2),...,(2x2)", 10) == [[10, 10], [10, 20], [20, 10], [20, 20]]
    for other in ([[1, 2]], "[[384, 768]]", "(1x1),...", "(1x1)...(6x6)", None, "(axb)"):
        assert in_pixels(other, 10) is other
    assert REAL.pinpoints == tuple((width, height) for height, width in LlavaOnevisionConfig.from_hf({}).pinpoints)


@pytest.mark.parametrize("size", ["0.5b", "7b", "72b"])
def test_the_originals_are_the_conversions_twins(size):
    """Apart from 64 rows of new words, the conversion has every number of the original, and no other."""
    name = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    text = CONFIGS[name]["text_config"]
    vocab_size = text["vocab_size"] - 64
    more = {"vocab_size": vocab_size, "tie_word_embeddings": CONFIGS[name]["tie_word_embeddings"]}
    config = {key: value for key, value in text.items() if key not in ("model_type", "architectures")} | MM | more
    hub = to_hub(config, tower_sizes("google/siglip-so400m-patch14-384", None), 151646, 151647)
    rows = num_bytes({"table": (64 * (1 if more["tie_word_embeddings"] else 2), text["hidden_size"])})
    assert num_bytes(ours(hub)) + rows == num_bytes(shapes(name))
    stored = ours(hub, llava_original.KEYS)
    for known in ("model.mm_projector.2.bias", "model.image_newline", "model.layers.0.self_attn.q_proj.bias"):
        assert known in stored
    tower = {tensor for tensor in stored if tensor.startswith(llava_original.INSIDE)}
    assert len(tower) == 26 * 16 + 5


REFUSED = [
    ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode"),
    ({"mm_newline_position": "grid"}, "mm_newline_position"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type"),
    ({"image_aspect_ratio": "anyres_max"}, "vision_aspect_ratio"),
    ({"image_grid_pinpoints": "(1x1),...,"}, "image_grid_pinpoints"),
    ({"image_grid_pinpoints": None}, "image_grid_pinpoints"),
    ({"mm_vision_tower": "./clip"}, "./clip"),
    ({"mm_projector_type": "pooler"}, "mm_projector_type"),
]


@pytest.mark.parametrize("changes, named", REFUSED, ids=str)
def test_what_is_not_known_is_refused_by_name(tmp_path, changes, named):
    folder = original(tmp_path / "original", **changes)
    (folder / "clip").mkdir()
    tiny.write_json(folder / "clip" / "config.json", {"model_type": "clip"})
    with pytest.raises(MinivlmError) as error:
        load(folder)
    assert named in str(error.value) and "\n" not in str(error.value)
