"""Original LLaVA checkpoints: against the same weights in the hub's layout, and against that repository's rules."""

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from llava_twins import BASE, KINDS, MM, PINPOINTS, opened, twins
from PIL import Image
from safetensors.torch import load_file
from tiny import close, load, our_logits, picture, turn
from transformers import AutoModelForImageTextToText, AutoProcessor

from minivlm import Prompt
from minivlm.images import anyres_grid
from minivlm.models.llava import CLIP_LARGE
from minivlm.models.llava_next import LlavaNextConfig, arrange, num_image_tokens
from minivlm.models.llava_original import to_hub

# --- the same weights, the same logits --------------------------------------------------------------------------------

# Where both repositories process alike: a square is its own middle, and no pinpoints tie.
AGREEING = {"1.5": (60, 60), "1.6": (47, 91), "1.6 mistral": (91, 47)}


@pytest.mark.parametrize("tower", ["inside", "outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_hub_layouts(tmp_path, kind, tower):
    hub, original = load(twins(kind).hub), load(twins(kind).original(tmp_path / "original", tower))
    prompts = [Prompt("USER: <image>\nWhat? ASSISTANT:", images=[picture(*AGREEING[kind])]), Prompt("Hello")]
    theirs, ours = hub.preprocess(prompts), original.preprocess(prompts)
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.pixel_values, theirs.pixel_values)
    assert torch.equal(our_logits(original, ours), our_logits(hub, theirs)[:, :BASE])


@pytest.mark.parametrize("kind", ["1.5", "1.6 mistral"])
def test_a_saved_original_is_a_hub_checkpoint(tmp_path, kind):
    """transformers makes of it the ids, pixels and logits that minivlm makes of the original."""
    original = load(twins(kind).original(tmp_path / "original", "outside"))
    original.save(tmp_path / "saved")
    again, talk = load(tmp_path / "saved"), [[turn("user", picture(50, 91), "What?")]]
    processor = AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    theirs = tiny.their_inputs(processor, talk)
    ours = original.preprocess(talk)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"].flatten(0, -4))
    logits = our_logits(original, ours)
    assert torch.equal(our_logits(again, again.preprocess(talk))[:, :BASE], logits)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    theirs = tiny.their_logits(model, theirs)
    assert close(logits, theirs[:, :BASE])
    assert (theirs[:, BASE:].amax(1) < logits.amax(1)).all()  # a row that is only there for <image> is never said


def test_linear_and_deep_projectors(tmp_path):
    tensors = dict(twins("1.5").tensors)
    vlm = load(twins("1.5").original(tmp_path / "two"))
    features = torch.randn(1, 3, 32)
    first, second = (vlm.model.multi_modal_projector.get_submodule(f"linear_{i}") for i in (1, 2))
    assert torch.equal(vlm.model.multi_modal_projector(features), second(torch.nn.functional.gelu(first(features))))

    one = twins("1.5").original(tmp_path / "one", mm_projector_type="linear")
    move(one, {"model.mm_projector.0": "model.mm_projector", "model.mm_projector.2": None})
    assert torch.equal(load(one).model.multi_modal_projector(features), first(features))

    linear_2 = "multi_modal_projector.linear_2"
    third = {f"model.mm_projector.4.{leaf}": tensors[f"{linear_2}.{leaf}"] for leaf in ("weight", "bias")}
    three = twins("1.5").original(tmp_path / "three", mm_projector_type="mlp3x_gelu")
    move(three, {}, third)
    deep = load(three).model.multi_modal_projector(features)
    assert torch.equal(deep, second(torch.nn.functional.gelu(second(torch.nn.functional.gelu(first(features))))))


def move(folder, renamed, more=()):
    """Renames prefixes in a folder's model.safetensors (None: drops them), and adds `more`."""
    tensors = dict(more)
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next((prefix for prefix in renamed if name.startswith(prefix + ".")), None)
        if old is None or renamed[old]:
            tensors[name if old is None else renamed[old] + name.removeprefix(old)] = tensor
    tiny.save_tensors(tensors, folder)


def test_the_class_token_is_kept_where_the_config_keeps_it(tmp_path):
    vlm = load(twins("1.5").original(tmp_path / "original", mm_vision_select_feature="cls_patch"))
    prompt = Prompt("<image>", images=[picture(40, 40)])
    ids = vlm.preprocess([prompt]).input_ids
    assert (ids == vlm.model.config.image_token_id).sum() == 26  # 25 patches
    assert our_logits(vlm, vlm.preprocess([prompt])).shape[0] == ids.shape[1]


# --- pixels: the original's rules, written down slowly, in its own (width, height) ------------------------------------

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def slow_floats(pixels):
    return torch.from_numpy(((np.asarray(pixels) / 255 - MEAN) / STD).transpose(2, 0, 1)).float()


def slow_square(image, side):
    """1.5: the picture in the middle of a square of the mean colour, then shrunk as a whole."""
    width, height = image.size
    edge = max(width, height)
    canvas = np.empty((edge, edge, 3), np.uint8)
    canvas[:] = (122, 116, 104)
    top, left = (edge - height) // 2, (edge - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(image)
    return slow_floats(Image.fromarray(canvas).resize((side, side), Image.Resampling.BICUBIC))


def slow_pinpoint(width, height, points):
    """1.6: of [(width, height)], the one that keeps most pixels, then the one that wastes fewest, then the first."""

    def merit(point):
        scale = min(point[0] / width, point[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - point[0] * point[1]

    return max(points, key=merit)


def slow_tiles(image, points, side):
    """1.6: the picture squashed to a square; then on black, centred, cut into tiles row by row."""
    width, height = image.size
    across, down = slow_pinpoint(width, height, points)
    if across / width < down / height:
        size = across, min(math.ceil(height * (across / width)), down)
    else:
        size = min(math.ceil(width * (down / height)), across), down
    canvas = np.zeros((down, across, 3), np.uint8)
    top, left = (down - size[1]) // 2, (across - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    tiles = [canvas[y : y + side, x : x + side] for y in range(0, down, side) for x in range(0, across, side)]
    return torch.stack([slow_floats(view) for view in (image.resize((side, side), Image.Resampling.BICUBIC), *tiles)])


def slow_lines(width, height, rows, columns):
    """1.6: which patches are left when the bars are cut off, as a grid of their numbers; a newline ends each row."""
    patches = np.arange(rows * columns).reshape(rows, columns)
    if width / height > columns / rows:
        bar = (rows - int(height * (columns / width))) // 2
        return patches[bar : rows - bar]
    bar = (columns - int(width * (rows / height))) // 2
    return patches[:, bar : columns - bar]


SMALL = [  # (height, width) around every tie of the tiny pinpoints, odd remainders, slivers
    (1, 1), (2, 1), (1, 2), (3, 200), (200, 3), (39, 39), (40, 40), (41, 41), (79, 79), (80, 80), (81, 81), (40, 80),
    (80, 40), (41, 80), (57, 33), (33, 57), (101, 67), (122, 7), (64, 1024), (1024, 64), (119, 40), (40, 121),
]  # fmt: skip


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_pixels_and_counts_are_the_originals(size):
    image = picture(*size)
    prompts = [Prompt("<image>", images=[image])]
    assert close(opened("1.5").preprocess(prompts).pixel_values[0], slow_square(image, 40), 1e-6)
    inputs = opened("1.6").preprocess(prompts)
    assert close(inputs.pixel_values, slow_tiles(image, PINPOINTS, 40), 1e-6)
    across, down = slow_pinpoint(*image.size, PINPOINTS)
    lines = slow_lines(*image.size, down // 8, across // 8)
    assert (inputs.input_ids == BASE).sum() == 25 + lines.size + len(lines)


def test_pixels_differ_from_the_hubs():
    """The twin of the test above: without the square, and with pinpoints as (height, width), it would fail."""
    for kind, size in (("1.5", (40, 90)), ("1.6", (30, 30))):
        prompts = [Prompt("<image>", images=[picture(*size)])]
        theirs = load(twins(kind).hub).preprocess(prompts)
        ours = opened(kind).preprocess(prompts)
        assert not torch.equal(ours.pixel_values, theirs.pixel_values)


def test_the_centre_is_cut_where_the_config_does_not_pad(tmp_path):
    original = load(twins("1.5").original(tmp_path / "original", image_aspect_ratio="square"))
    prompts = [Prompt("<image>", images=[picture(40, 90)])]
    theirs = load(twins("1.5").hub).preprocess(prompts)
    assert torch.equal(original.preprocess(prompts).pixel_values, theirs.pixel_values)


# --- grids and tokens at the published size ---------------------------------------------------------------------------

REAL_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
REAL = MM | {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": REAL_PINPOINTS, "image_token_index": 64002,
    "vocab_size": 32000,
}  # fmt: skip
REAL_CONFIG = LlavaNextConfig.from_hf(to_hub(REAL, CLIP_LARGE, 32000))

sides = st.integers(1, 1400)


@given(sides, sides)
@example(331, 331)
@example(332, 332)
@example(335, 337)
@example(337, 335)
@example(336, 336)
@example(337, 337)
@example(671, 671)
@example(673, 673)
@example(64, 1024)
@example(1024, 64)
@example(10, 1000)  # no row is left
@example(1000, 10)  # no column is left, but a newline for each row
@example(110, 176)  # int() and int(round()) differ
@example(198, 176)
@example(376, 799)
@example(899, 1024)
@example(1, 20000)
def test_grid_and_tokens_are_the_originals(height, width):
    across, down = slow_pinpoint(width, height, REAL_PINPOINTS)
    grid = anyres_grid((height, width), REAL_CONFIG.pinpoints, 336)
    assert grid == (down // 336, across // 336)
    rows, columns = 24 * grid[0], 24 * grid[1]
    lines = slow_lines(width, height, rows, columns)
    wanted = [*range(-576, 0), *(token for line in lines for token in [*line, -1000])]
    numbers = torch.arange(rows * columns).view(grid[0], 24, grid[1], 24).transpose(1, 2).reshape(-1, 576)
    tiles = torch.cat([torch.arange(-576, 0)[None], numbers])[..., None]
    ours = arrange(tiles, grid, (height, width), torch.tensor([-1000]), REAL_CONFIG.round_unpadding)
    assert ours.flatten().tolist() == wanted
    assert num_image_tokens(REAL_CONFIG, (height, width), grid) == len(wanted)


def test_rounding_first_or_height_first_would_be_seen():
    as_hub = LlavaNextConfig.from_hf(to_hub(REAL, CLIP_LARGE, 32000) | {"round_unpadding": True})
    for size in ((110, 176), (198, 176), (376, 799)):
        grid = anyres_grid(size, REAL_CONFIG.pinpoints, 336)
        assert num_image_tokens(as_hub, size, grid) != num_image_tokens(REAL_CONFIG, size, grid)
    assert anyres_grid((300, 300), REAL_CONFIG.pinpoints, 336) == (2, 1)  # portrait
    assert anyres_grid((300, 300), tuple(map(tuple, REAL_PINPOINTS)), 336) == (1, 2)  # landscape
