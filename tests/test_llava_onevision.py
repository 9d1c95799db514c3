"""LLaVA-OneVision against transformers at every seam, for pictures and films; its pooling, its shrinking, its laws."""

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from onevision_tiny import KINDS, PINPOINTS, PIXELS, STORED, TALKS, TheirProcessor, opened, their_inputs
from tiny import close, film, load, our_logits, picture, their_answers, their_embeddings, their_logits, turn
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from minivlm import Prompt
from minivlm.images import anyres_grid, anyres_tiles
from minivlm.models import llava_onevision
from minivlm.models.llava_onevision import LlavaOnevisionConfig, arrange, num_image_tokens, num_video_tokens, pool

SIZES = [
    (43, 43), (42, 44), (1, 1), (1, 60), (60, 1), (86, 43), (43, 86), (33, 171), (300, 300), (119, 121), (160, 40),
    (7, 300), (300, 7), (172, 129), (129, 173), (259, 258),
]  # fmt: skip


def their_tiles(theirs):
    """Their (N, most tiles, 3, tile, tile), zeros behind the tiles of small pictures → ours, without them."""
    among = [n for n in theirs["batch_num_images"].tolist() for _ in range(n)]
    counts = [math.prod(anyres_grid(size, PINPOINTS, 43)) for size in theirs["image_sizes"].tolist()]
    pictures = zip(theirs["pixel_values"], among, counts, strict=True)
    return torch.cat([tiles[: 1 + count if n == 1 else 1] for tiles, n, count in pictures])


def of_pictures(theirs):
    return {name: theirs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_ids_and_tokens_of_a_picture_equal_transformers(size):
    checkpoint, vlm = opened()
    talk = [turn("user", picture(*size), "What do you see?")]
    ours, theirs = vlm.preprocess([talk]), their_inputs(checkpoint.processor, [talk])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"][0])
    assert torch.equal(ours.image_sizes, theirs["image_sizes"])
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    with torch.inference_mode():
        (wanted,) = checkpoint.theirs.model.get_image_features(**of_pictures(theirs), return_dict=True).pooler_output
        assert close(vlm.model.encode_images(ours), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_seam_equals_transformers(kind):
    checkpoint, vlm = opened(kind)
    config, model = vlm.model.config.llava, checkpoint.theirs.model
    ours, theirs = vlm.preprocess(TALKS), their_inputs(checkpoint.processor, TALKS)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    assert torch.equal(ours.pixel_values, their_tiles(theirs))
    assert torch.equal(ours.pixel_values_videos, theirs["pixel_values_videos"].flatten(0, 1))
    with torch.inference_mode():
        states = model.vision_tower(ours.pixel_values, output_hidden_states=True).hidden_states
        wanted = torch.cat([states[i] for i in config.feature_layers], -1)
        assert close(vlm.model.vision_tower(ours.pixel_values, config.feature_layers, False), wanted)
        pictures = model.get_image_features(**of_pictures(theirs), return_dict=True).pooler_output
        assert close(vlm.model.encode_images(ours), torch.cat(tuple(pictures)))
        films = model.get_video_features(theirs["pixel_values_videos"], return_dict=True).pooler_output
        assert close(vlm.model.encode_videos(ours), films.flatten(0, 1))
        assert close(vlm.model.embed(ours), their_embeddings(checkpoint.theirs, theirs))
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))


FIXTURE = np.load(Path(__file__).parent / "fixtures" / "llava_onevision_videos" / "films.npz")
MEAN, STD = (torch.tensor(PIXELS[f"image_{name}"])[:, None, None] for name in ("mean", "std"))


@pytest.mark.parametrize("name", STORED)
def test_films_equal_transformers_own_video_processor(name):
    """Ids to the last one, logits, 16 greedy tokens; pixels to two grey levels: theirs does not resize with Pillow."""
    checkpoint, vlm = opened()
    ours = vlm.preprocess(STORED[name])
    assert torch.equal(ours.input_ids, torch.from_numpy(FIXTURE[f"{name}.ids"]).long())
    wanted = torch.from_numpy(FIXTURE[f"{name}.pixels"]).float()
    apart = (((ours.pixel_values_videos * STD + MEAN) * 255).round() - wanted).abs()
    assert apart.max() <= (0 if name in ("8 frames", "batch") else 2)
    theirs = their_inputs(checkpoint.processor, STORED[name])
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))
    pad_id = vlm.processor.tokenizer.pad_id
    answers = their_answers(checkpoint.theirs, theirs, vlm.eos_ids, pad_id, max_new_tokens=16)
    assert [result.token_ids for result in vlm.generate(STORED[name], max_new_tokens=16)] == answers


def test_a_film_of_other_frames_is_not_equal():
    """The twin of the test above."""
    _, vlm = opened()
    ours = vlm.preprocess([[turn("user", film(5, 60, 40)[::-1], "What?")]])
    wanted = torch.from_numpy(FIXTURE["5 frames.pixels"]).float()
    assert (((ours.pixel_values_videos * STD + MEAN) * 255).round() - wanted).abs().max() > 2


# --- the twins: what must break parity --------------------------------------------------------------------------------

WRONG_CONFIGS = {
    "the layer before the last": {"vision_feature_layer": -2},
    "another activation in the projector": {"projector_hidden_act": "relu"},
    "the exact GELU in the tower": {"vision_config.hidden_act": "gelu"},
    "another eps in the tower": {"vision_config.layer_norm_eps": 1e-3},
    "another theta": {"text_config.rope_theta": 1e4},
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_another_number_in_the_config_breaks_parity(tmp_path, change):
    checkpoint, vlm = opened()
    other = load(tiny.variant(checkpoint.folder, tmp_path / "changed", WRONG_CONFIGS[change]))
    assert not close(our_logits(other, other.preprocess(TALKS)), our_logits(vlm, vlm.preprocess(TALKS)), atol=1e-3)


def column_by_column(tiles, grid, *rest):
    rows, columns = grid
    if rows * columns:
        turned = tiles[1:].unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
        tiles = torch.cat([tiles[:1], turned])
    return arrange(tiles, grid, *rest)


def shrink(**mode):
    return lambda x, size: F.interpolate(x.permute(0, 3, 1, 2), size, **mode).permute(0, 2, 3, 1)


TRAPS = {  # (what it replaces, with what)
    "no newline": ("arrange", lambda *args: arrange(*args[:3], 0 * args[3], args[4])),
    "the newline in front": ("arrange", lambda *args: arrange(*args).roll(1, 0)),
    "the overview behind the tiles": ("arrange", lambda *args: arrange(*args).roll(-25, 0)),
    "tiles column by column": ("arrange", column_by_column),
    "shrinking with antialiasing": ("shrink", shrink(mode="bilinear", antialias=True)),
    "shrinking from corner to corner": ("shrink", shrink(mode="bilinear", align_corners=True)),
    "shrinking to means": ("shrink", shrink(mode="area")),
    "means of films": ("pool", lambda x: shrink(mode="area")(x.unflatten(1, (5, 5)), (3, 3)).flatten(1, 2)),
    "films column by column": ("pool", lambda x: pool(x).unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)),
    "frames backwards": ("pool", lambda x: pool(x).flip(0)),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_another_arrangement_breaks_parity(monkeypatch, trap):
    checkpoint, vlm = opened()
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    monkeypatch.setattr(llava_onevision, *TRAPS[trap])
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


@pytest.mark.parametrize("place", [slice(-1, None), slice(9, 10)], ids=["no newline behind a film", "another patch"])
def test_another_film_token_breaks_parity(monkeypatch, place):
    checkpoint, vlm = opened()
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    tokens = vlm.model.encode_videos(vlm.preprocess(TALKS)).clone()
    tokens[place] = 0
    monkeypatch.setattr(vlm.model, "encode_videos", lambda _: tokens)
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


def test_several_pictures_that_are_squashed_or_cut_are_not_theirs(monkeypatch):
    checkpoint, vlm = opened()
    theirs = their_inputs(checkpoint.processor, [TALKS[2]])
    monkeypatch.setattr(
        llava_onevision, "tiles_of", lambda pictures, images: [(anyres_tiles(p, images)[:1], (0, 0)) for p in pictures]
    )
    squashed = vlm.preprocess([TALKS[2]])
    assert torch.equal(squashed.input_ids, theirs["input_ids"])
    assert not close(squashed.pixel_values, theirs["pixel_values"][:, 0], atol=0.1)
    monkeypatch.setattr(
        llava_onevision, "tiles_of",
        lambda pictures, images: [
            (anyres_tiles(p, images), anyres_grid((p.height, p.width), PINPOINTS, 43)) for p in pictures
        ],
    )  # fmt: skip
    assert vlm.preprocess([TALKS[2]]).input_ids.shape != theirs["input_ids"].shape


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_pictures_and_films_give_the_same_tokens_in_any_company():
    """A picture has one form alone and another among pictures; a film changes neither."""
    _, vlm = opened()
    one, two, three = picture(47, 191), picture(130, 77, 2), picture(1, 1)
    with torch.inference_mode():
        images, videos = vlm.model.encode_images, vlm.model.encode_videos

        def inputs(*parts):
            return vlm.preprocess([[turn("user", *parts, "Describe.")]])

        assert close(images(inputs(one, film(2))), images(inputs(one)), atol=2e-5)
        assert close(images(inputs(one, two, three))[: 2 * 26], images(inputs(one, two, film(3))), atol=2e-5)
        assert close(images(inputs(two, three, one))[-26:], images(inputs(two, one))[-26:], atol=2e-5)
        alone = [videos(inputs(film(3))), videos(inputs(film(4, 20, 30, 1)))]
        assert close(videos(inputs(film(3), one, film(4, 20, 30, 1), two)), torch.cat(alone), atol=2e-5)


def test_a_prompt_is_what_its_messages_render_to():
    _, vlm = opened()
    pictures, own = [picture(40, 40, 1), picture(130, 77, 2)], film(2)
    text = "<|im_start|>user <image><image><video>\nCompare.<|im_end|><|im_start|>assistant\n"
    ours = vlm.preprocess([Prompt(text, images=pictures, videos=[own])])
    wanted = vlm.preprocess([[turn("user", *pictures, own, "Compare.")]])
    for name in ("input_ids", "pixel_values", "image_grids", "pixel_values_videos", "video_sizes"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name))


# --- how many tokens --------------------------------------------------------------------------------------------------

sides = st.integers(1, 4000)
PUBLISHED = LlavaOnevisionConfig.from_hf({})


@pytest.fixture(scope="module")
def published():
    """The processor of the published checkpoints: 384 pixels a tile, 27 × 27 patches."""
    tokenizer = opened()[0].processor.tokenizer
    return TheirProcessor(
        LlavaOnevisionImageProcessorPil(), tokenizer, num_image_tokens=729, vision_feature_select_strategy="full"
    )


@given(height=sides, width=sides)
@example(384, 384)
@example(2304, 2304)
@example(1, 4000)
@example(4000, 1)
@example(1152, 1400)  # 81 x 98 patches, just below 1.1 times the side of 9 tiles
@example(1152, 1415)  # 81 x 99, just above
def test_a_picture_is_as_many_tokens_as_theirs_and_as_arrange_returns(published, height, width):
    grid = anyres_grid((height, width), PUBLISHED.pinpoints, 384)
    ours = num_image_tokens(PUBLISHED, (height, width), grid)
    (theirs,) = published._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
    assert ours == theirs
    tiles = torch.zeros(1 + math.prod(grid), 729, 1)
    assert ours == len(arrange(tiles, grid, (height, width), torch.zeros(1), PUBLISHED))
    assert num_image_tokens(PUBLISHED, (height, width), (0, 0)) == 730


@pytest.mark.parametrize("num_frames", range(1, 65))
def test_a_film_is_as_many_tokens_as_theirs(published, num_frames):
    (theirs,) = published._get_num_multimodal_tokens(video_sizes=[(num_frames, 384, 384)])["num_video_tokens"]
    assert num_video_tokens(PUBLISHED, num_frames) == theirs == 196 * num_frames + 1
    assert num_video_tokens(PUBLISHED, num_frames) == pool(torch.zeros(num_frames, 729, 1)).numel() + 1


@given(height=st.integers(1, 400), width=st.integers(1, 400))
def test_arrange_equals_transformers(height, width):
    """Which patch comes where, shrunk or not, newlines and all; with five patches a side, so that bars may be odd."""
    checkpoint, vlm = opened()
    grid = anyres_grid((height, width), PINPOINTS, 43)
    tiles = torch.arange((1 + math.prod(grid)) * 25.0).view(-1, 25, 1)
    newline = torch.tensor([-1.0])
    theirs, _ = checkpoint.theirs.model.pack_image_features([tiles], torch.tensor([[height, width]]), newline)
    assert close(arrange(tiles, grid, (height, width), newline, vlm.model.config), theirs[0], atol=1e-3)


def test_arrange_and_pool_by_hand():
    """A frame of 3 x 3 patches becomes 2 x 2. Point i of the new grid lies at (i + 0.5) · 1.5 − 0.5 = 0.25 or 1.75 of
    the old one, between its neighbours in these proportions:

        0 1 2     0.25 · 3 + 0.25 = 1.0, 0.25 · 3 + 1.75 = 2.5
        3 4 5  →  1.75 · 3 + 0.25 = 5.5, 1.75 · 3 + 1.75 = 7.0
        6 7 8
    """
    assert pool(torch.arange(9.0).view(1, 9, 1)).flatten().tolist() == [1.0, 2.5, 5.5, 7.0]
    square = torch.arange(4.0).view(1, 4, 1)  # one of several pictures: its patches and one newline
    assert arrange(square, (0, 0), (10, 40), torch.tensor([-1.0]), PUBLISHED).flatten().tolist() == [0, 1, 2, 3, -1]
