"""LLaVA-NeXT against transformers with each of its text models, at every seam; how tiles are arranged; its own laws."""

import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from llava_next_tiny import KINDS, PINPOINTS, TALKS, opened
from tiny import close, load, our_logits, picture, their_embeddings, their_inputs, their_logits, turn
from transformers import AutoConfig, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from minivlm import decoder
from minivlm.errors import MinivlmError
from minivlm.images import anyres_grid
from minivlm.models import llava_next
from minivlm.models.llava_next import LlavaNextConfig, arrange, num_image_tokens

SIZES = [
    (40, 40), (39, 41), (41, 39), (1, 1), (1, 60), (60, 1), (80, 40), (40, 80), (33, 171), (257, 90), (119, 121),
    (160, 40), (7, 300), (300, 7), (79, 81),
]  # fmt: skip


def their_tiles(theirs):
    """Their (N, most tiles, 3, tile, tile), zeros behind the tiles of small pictures → ours, without them."""
    grids = [anyres_grid(size, PINPOINTS, 40) for size in theirs["image_sizes"].tolist()]
    pictures = zip(theirs["pixel_values"], grids, strict=True)
    return torch.cat([tiles[: 1 + rows * columns] for tiles, (rows, columns) in pictures])


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_ids_and_image_tokens_equal_transformers(size):
    checkpoint, vlm = opened()
    talk = [turn("user", picture(*size), "What do you see?")]
    ours, theirs = vlm.preprocess([talk]), their_inputs(checkpoint.processor, [talk])
    assert torch.equal(ours.pixel_values, theirs["pixel_values"][0])
    assert torch.equal(ours.image_sizes, theirs["image_sizes"])
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    with torch.inference_mode():
        (wanted,) = checkpoint.theirs.model.get_image_features(**vision_of(theirs), return_dict=True).pooler_output
        assert close(vlm.model.encode_images(ours), wanted)


def vision_of(theirs):
    return {name: theirs[name] for name in ("pixel_values", "image_sizes")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_seam_equals_transformers(kind):
    """A left-padded batch: one picture, none, three over two turns, and the smallest."""
    checkpoint, vlm = opened(kind)
    config, model = vlm.model.config.llava, checkpoint.theirs.model
    ours, theirs = vlm.preprocess(TALKS), their_inputs(checkpoint.processor, TALKS)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    assert torch.equal(ours.pixel_values, their_tiles(theirs))
    with torch.inference_mode():
        states = model.vision_tower(ours.pixel_values, output_hidden_states=True).hidden_states
        wanted = torch.cat([states[i] for i in config.feature_layers], -1)[:, 1:]
        features = vlm.model.vision_tower(ours.pixel_values, config.feature_layers, config.drop_class_token)
        assert close(features, wanted)
        arranged = model.get_image_features(**vision_of(theirs), return_dict=True).pooler_output
        assert close(vlm.model.encode_images(ours), torch.cat(tuple(arranged)))
        assert close(vlm.model.embed(ours), their_embeddings(checkpoint.theirs, theirs))
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))


# --- the twins: what must break parity --------------------------------------------------------------------------------

WRONG_CONFIGS = {  # (kind, change)
    "the last layer": ("vicuna", {"vision_feature_layer": -1}),
    "another activation in the projector": ("vicuna", {"projector_hidden_act": "relu"}),
    "another theta": ("mistral", {"text_config.rope_theta": 1e4}),
    "no window": ("mistral with a window", {"text_config.sliding_window": None}),
    "a window one smaller": ("mistral with a window", {"text_config.sliding_window": 10}),
    "a window in every layer": ("qwen with a window", {"text_config.max_window_layers": 0}),
    "a window in no layer": ("qwen with a window", {"text_config.use_sliding_window": False}),
    "feature layers in another order": ("qwen", {"vision_feature_layer": [1, -2]}),
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_another_number_in_the_config_breaks_parity(tmp_path, change):
    kind, config = WRONG_CONFIGS[change]
    checkpoint, _ = opened(kind)
    vlm = load(tiny.variant(checkpoint.folder, tmp_path / "changed", config))
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


def column_by_column(tiles, grid, *rest):
    rows, columns = grid
    turned = tiles[1:].unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    return arrange(torch.cat([tiles[:1], turned]), grid, *rest)


TRAPS = {
    "no newline": lambda tiles, grid, size, newline, *rest: arrange(tiles, grid, size, 0 * newline, *rest),
    "the overview behind the tiles": lambda *args: arrange(*args).roll(-25, 0),
    "the newline in front of its row": lambda *args: arrange(*args).roll(1, 0),
    "tiles column by column": column_by_column,
    "patches column by column": lambda tiles, *rest: arrange(
        tiles.unflatten(1, (5, 5)).transpose(1, 2).flatten(1, 2), *rest
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_another_arrangement_breaks_parity(monkeypatch, trap):
    checkpoint, vlm = opened()
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    monkeypatch.setattr(llava_next, "arrange", TRAPS[trap])
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


def test_pinpoints_as_width_and_height_break_parity():
    checkpoint, vlm = opened()
    swapped = [[width, height] for height, width in PINPOINTS]
    ours = vlm.preprocess(TALKS, images_kwargs={"image_grid_pinpoints": swapped})
    assert ours.input_ids.shape != their_inputs(checkpoint.processor, TALKS)["input_ids"].shape


def test_a_dropped_mask_breaks_parity(monkeypatch):
    checkpoint, vlm = opened()
    theirs = their_logits(checkpoint.theirs, their_inputs(checkpoint.processor, TALKS))
    monkeypatch.setattr(decoder, "causal_mask", lambda *_: None)
    assert not close(our_logits(vlm, vlm.preprocess(TALKS)), theirs, atol=1e-3)


def test_a_folder_without_a_template_gets_vicunas(tmp_path):
    checkpoint, vlm = opened()
    other = load(tiny.variant(checkpoint.folder, tmp_path / "bare", drop=["chat_template*"]))
    assert torch.equal(other.preprocess(TALKS).input_ids, vlm.preprocess(TALKS).input_ids)


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_a_picture_gives_the_same_tokens_in_any_company():
    _, vlm = opened()
    pictures = [picture(47, 191), picture(230, 77, 2), picture(1, 1)]
    with torch.inference_mode():
        alone = [vlm.model.encode_images(vlm.preprocess([[turn("user", p, "Describe.")]])) for p in pictures]
        together = vlm.model.encode_images(vlm.preprocess([[turn("user", *pictures, "Compare.")]]))
    assert close(together, torch.cat(alone), atol=2e-5)


# --- how many tokens a picture becomes --------------------------------------------------------------------------------

sides = st.integers(1, 4000)
PUBLISHED = LlavaNextConfig.from_hf({})


@pytest.fixture(scope="module")
def published():
    """The processor of the published checkpoints: 336 pixels a tile, 14 a patch."""
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    tokenizer = opened()[0].processor.tokenizer
    return LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


@given(height=sides, width=sides)
def test_a_picture_is_as_many_tokens_as_theirs_and_as_arrange_returns(published, height, width):
    grid = anyres_grid((height, width), PUBLISHED.pinpoints, 336)
    ours = num_image_tokens(PUBLISHED, (height, width), grid)
    (theirs,) = published._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
    assert ours == theirs
    assert ours == len(arrange(torch.zeros(1 + grid[0] * grid[1], 576, 1), grid, (height, width), torch.zeros(1)))


@given(height=sides, width=sides)
def test_arrange_equals_transformers(height, width):
    """Which patch comes where, newlines and all; with five patches a side, so that bars may be odd."""
    checkpoint, _ = opened()
    rows, columns = anyres_grid((height, width), PINPOINTS, 40)
    tiles = torch.arange((1 + rows * columns) * 25.0).view(1 + rows * columns, 25, 1)
    newline = torch.tensor([-1.0])
    theirs, _ = checkpoint.theirs.model.pack_image_features(
        [tiles], torch.tensor([[height, width]]), "default", image_newline=newline
    )
    assert torch.equal(arrange(tiles, (rows, columns), (height, width), newline), theirs[0])


def test_arrange_by_hand():
    """One row of two tiles of 2 x 2 patches, for a picture of 10 x 40 pixels: the grid is 2 x 4 patches, the picture's
    share of it one row of four, but bars are cut off in pairs, so both rows stay, each with its newline.

        overview 0 1 2 3, tiles 4 5 | 8 9    →  0 1 2 3   4 5 8 9 N   6 7 10 11 N
                                6 7 | 10 11
    """
    tiles = torch.arange(12.0).view(3, 4, 1)
    ours = arrange(tiles, (1, 2), (10, 40), torch.tensor([-1.0]))
    assert ours[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [{}, {"model_type": "mistral"}, {"model_type": "qwen2", "vocab_size": 99}], ids=str)
@pytest.mark.parametrize("vision", [None, {}, {"model_type": "clip_vision_model"}], ids=str)
def test_what_a_config_leaves_out_is_what_transformers_takes(text, vision):
    sparse = {"text_config": text} | ({} if vision is None else {"vision_config": vision})
    theirs = AutoConfig.for_model("llava_next", **json.loads(json.dumps(sparse)))
    assert LlavaNextConfig.from_hf(sparse) == LlavaNextConfig.from_hf(json.loads(json.dumps(theirs.to_dict())))


def test_a_class_token_among_the_patches_is_refused():
    with pytest.raises(MinivlmError, match="vision_feature_select_strategy"):
        LlavaNextConfig.from_hf({"vision_feature_select_strategy": "full"})


def test_pixels_that_the_tower_cannot_see_are_refused():
    _, vlm = opened()
    with pytest.raises(MinivlmError, match="40 x 40"):
        vlm.preprocess(TALKS, images_kwargs={"crop_size": 20})
