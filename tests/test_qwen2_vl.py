"""Qwen2-VL against transformers, at every seam: pictures of any size, several, films, left-padded batches; M-RoPE."""

import numpy as np
import pytest
import tiny
import torch
from qwen2_vl_tiny import (
    FILMS,
    KINDS,
    PICTURES,
    SIZES,
    VIDEO,
    ask,
    by_cell,
    film,
    of_inputs,
    opened,
    slow_positions,
    their_ids,
    their_images,
    their_logits,
    their_positions,
)  # fmt: skip
from tiny import close, load, our_logits, picture, turn

from minivlm import decoder
from minivlm.layers import attention
from minivlm.models import qwen2_vl

# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_ids_and_image_tokens_equal_transformers(size):
    checkpoint, vlm = opened()
    talk = [turn("user", picture(*size), "What do you see?")]
    ours, theirs = vlm.preprocess([talk]), their_images([picture(*size)])
    grids = theirs["image_grid_thw"]
    assert torch.equal(ours.image_grid_thw, grids)
    assert torch.equal(by_cell(ours.pixel_values, grids), theirs["pixel_values"])
    ids = their_ids(checkpoint.folder, [talk], {"<|image_pad|>": [int(grids.prod()) // 4]})
    assert torch.equal(ours.input_ids, ids["input_ids"])
    with torch.inference_mode():
        tokens = checkpoint.theirs.model.visual(theirs["pixel_values"], grid_thw=grids).pooler_output
        assert close(vlm.model.encode_images(ours), tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("talks", [PICTURES, FILMS], ids=["pictures", "films"])
def test_every_seam_equals_transformers(kind, talks):
    checkpoint, vlm = opened(kind)
    ours = vlm.preprocess(talks)
    theirs, visual = of_inputs(ours), checkpoint.theirs.model.visual
    grids = {"<|image_pad|>": ours.image_grid_thw, "<|video_pad|>": ours.video_grid_thw}
    counts = {token: [] if grid is None else (grid.prod(-1) // 4).tolist() for token, grid in grids.items()}
    ids = their_ids(checkpoint.folder, talks, counts)
    assert torch.equal(ours.input_ids, ids["input_ids"])
    assert torch.equal(ours.attention_mask, ids["attention_mask"])
    real = ours.attention_mask > 0
    assert torch.equal(vlm.model.positions(ours)[:, real], their_positions(checkpoint.theirs, theirs)[:, real])
    with torch.inference_mode():
        wanted = visual(theirs["pixel_values"], grid_thw=theirs["image_grid_thw"]).pooler_output
        assert close(vlm.model.encode_images(ours), wanted)
        if talks is FILMS:
            wanted = visual(theirs["pixel_values_videos"], grid_thw=theirs["video_grid_thw"]).pooler_output
            assert close(vlm.model.encode_videos(ours), wanted)
    assert close(our_logits(vlm, ours), their_logits(checkpoint.theirs, theirs))


@pytest.mark.parametrize("num_frames", [1, 2, 5, 7, 24, 30])
def test_films_equal_transformers(num_frames):
    """Pixels frame by frame, and logits: the long ones' with the paper's positions, which it takes if it is told."""
    checkpoint, vlm = opened()
    part = film(num_frames, 21, 43)
    ours = vlm.preprocess([ask("See ", part, "What moves?")])
    frames = their_images(part["video"])
    pairs = -(-num_frames // 2)
    t, h, w = ours.video_grid_thw[0].tolist()
    assert [t, h, w] == [pairs, *frames["image_grid_thw"][0, 1:].tolist()]
    theirs = frames["pixel_values"].view(num_frames, h * w, 3, 2, 16)[:, :, :, 0]
    theirs = torch.cat([theirs, theirs[-1:]])[: 2 * pairs].unflatten(0, (pairs, 2)).permute(0, 2, 3, 1, 4)
    assert torch.equal(by_cell(ours.pixel_values_videos, ours.video_grid_thw), theirs.flatten(0, 1).flatten(1))
    positions = vlm.model.positions(ours)
    assert positions[:, 0].T.tolist() == [
        list(p) for p in slow_positions(ours.input_ids[0].tolist(), {VIDEO: [(t, h, w)]})
    ]
    wanted = their_logits(checkpoint.theirs, of_inputs(ours), position_ids=positions)
    assert close(our_logits(vlm, ours), wanted)
    own = their_positions(checkpoint.theirs, of_inputs(ours))
    assert torch.equal(own, positions) == (pairs <= max(h, w) // 2)


# --- the twins: what must break parity --------------------------------------------------------------------------------

WRONG_CONFIGS = {  # (kind, change)
    "other sections": ("untied", {"rope_scaling": {"type": "mrope", "mrope_section": [3, 2, 1]}}),
    "another theta": ("untied", {"rope_theta": 2e4}),
    "another theta in the tower": ("untied", {"vision_config.rope_parameters": {"rope_theta": 2e4}}),
    "another activation in the tower": ("untied", {"vision_config.hidden_act": "relu"}),
    "no window": ("with a window", {"use_sliding_window": False}),
    "a window one smaller": ("with a window", {"sliding_window": 18}),
    "a window in every layer": ("with a window", {"max_window_layers": 0}),
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_another_number_in_the_config_breaks_parity(tmp_path, change):
    kind, config = WRONG_CONFIGS[change]
    checkpoint, vlm = opened(kind)
    other = load(tiny.variant(checkpoint.folder, tmp_path / "changed", config))
    theirs = their_logits(checkpoint.theirs, of_inputs(vlm.preprocess(FILMS)))
    assert not close(our_logits(other, vlm.preprocess(FILMS)), theirs, atol=1e-3)


def broken_logits(talks=FILMS):
    """(ours, theirs) of a model that a test has harmed."""
    checkpoint, vlm = opened()
    inputs = vlm.preprocess(talks)
    return our_logits(vlm, inputs), their_logits(checkpoint.theirs, of_inputs(inputs))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_of_positions_that_is_ignored_breaks_parity(monkeypatch, row):
    """Its channels turn by the next row instead."""
    whole = qwen2_vl.mrope_positions

    def without(*args):
        positions = whole(*args)
        positions[row] = positions[(row + 1) % 3]
        return positions

    monkeypatch.setattr(qwen2_vl, "mrope_positions", without)
    assert not close(*broken_logits(), atol=1e-3)


def test_pictures_that_see_each_other_break_parity(monkeypatch):
    """Two pictures as one block of attention."""
    forward = qwen2_vl.Attention.forward
    monkeypatch.setattr(
        qwen2_vl.Attention, "forward", lambda self, x, p, f, _: forward(self, x, p, f, [[1, 1, len(x)]])
    )
    assert not close(*broken_logits([PICTURES[2]]), atol=1e-3)


def test_frame_pairs_that_see_each_other_break_parity(monkeypatch):
    forward = qwen2_vl.Attention.forward
    monkeypatch.setattr(
        qwen2_vl.Attention, "forward",
        lambda self, x, p, f, grids: forward(self, x, p, f, [[1, t * h, w] for t, h, w in grids]),
    )  # fmt: skip
    assert not close(*broken_logits([FILMS[0]]), atol=1e-3)


def test_rows_and_columns_swapped_in_the_tower_break_parity(monkeypatch):
    right = qwen2_vl.raster_positions
    monkeypatch.setattr(qwen2_vl, "raster_positions", lambda grids: right(grids).flip(0))
    assert not close(*broken_logits(), atol=1e-3)


def test_a_dropped_mask_breaks_parity(monkeypatch):
    monkeypatch.setattr(decoder, "causal_mask", lambda *_: None)
    assert not close(*broken_logits(), atol=1e-3)


def test_patches_cell_by_cell_break_parity():
    checkpoint, vlm = opened()
    inputs = vlm.preprocess(PICTURES)
    theirs = their_logits(checkpoint.theirs, of_inputs(inputs))
    inputs.pixel_values = by_cell(inputs.pixel_values, inputs.image_grid_thw)
    assert not close(our_logits(vlm, inputs), theirs, atol=1e-3)


def test_no_conversation_leaves_a_trace_on_the_next():
    """The step from tokens to positions is the cache's: two conversations at once, decoded in turn, are as if alone."""
    _, vlm = opened()
    talks, ids = [[PICTURES[0]], [PICTURES[1]], [FILMS[0]]], torch.tensor([[7]])

    def steps(talk):
        cache = vlm.model.new_cache()
        yield vlm.model(vlm.preprocess(talk), cache, last_only=True)
        for _ in range(3):
            yield vlm.model.decode(ids, cache)

    with torch.inference_mode():
        alone = [list(steps(talk)) for talk in talks]
        together = zip(*[list(turns) for turns in zip(*map(steps, talks), strict=True)], strict=True)
        for one, other in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_wrong_delta_breaks_decoding():
    _, vlm = opened()
    with torch.inference_mode():
        logits = []
        for shift in (0, 5):
            cache = vlm.model.new_cache()
            vlm.model(vlm.preprocess(PICTURES), cache, last_only=True)
            cache.position_delta = cache.position_delta + shift
            logits.append(vlm.model.decode(torch.full((4, 1), 7), cache))
    assert not close(*logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_every_parameter_learns(kind):
    _, vlm = opened(kind)
    model, inputs = vlm.model, vlm.preprocess(FILMS)
    try:
        model.requires_grad_(True)
        model(inputs)[inputs.attention_mask > 0].logsumexp(-1).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    finally:
        model.zero_grad()
        model.requires_grad_(False)


def test_the_tower_makes_no_mask_and_no_attention_beyond_a_frame_pair(monkeypatch):
    _, vlm = opened()
    inputs, lengths = vlm.preprocess(FILMS), set()

    def watched(q, k, v, *masks):
        assert masks == ()
        lengths.add((q.shape[2], k.shape[2]))
        return attention(q, k, v)

    monkeypatch.setattr(qwen2_vl, "attention", watched)
    with torch.inference_mode():
        vlm.model.encode_images(inputs), vlm.model.encode_videos(inputs)
    grids = torch.cat([inputs.image_grid_thw, inputs.video_grid_thw])
    assert lengths == {(h * w, h * w) for _, h, w in grids.tolist()}


# --- metamorphic ------------------------------------------------------------------------------------------------------


def test_a_film_of_one_frame_is_a_picture():
    _, vlm = opened()
    (image, video) = (vlm.preprocess([ask(part, "What?")]) for part in (picture(24, 40, 0), film(1)))
    assert torch.equal(image.pixel_values, video.pixel_values_videos)
    assert torch.equal(image.image_grid_thw, video.video_grid_thw)


def test_a_film_may_be_an_array_or_pictures_that_were_opened():
    _, vlm = opened()
    part = film(5)
    array = part | {"video": np.stack([np.asarray(frame) for frame in part["video"]])}
    one, other = (vlm.preprocess([ask(p, "What?")]).pixel_values_videos for p in (part, array))
    assert torch.equal(one, other)
