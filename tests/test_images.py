"""Pixels equal those of transformers' PIL image processors in every bit; grids and counts equal its models'."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_processing_utils import select_best_resolution as their_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from minivlm import images
from minivlm.errors import MinivlmError
from minivlm.image_config import CLIP_DEFAULTS, CLIP_MEAN, ImageConfig
from minivlm.images import (
    anyres_grid,
    anyres_tiles,
    center_crop,
    expand_to_square,
    fitted_size,
    mean_colour,
    resize,
    select_best_resolution,
    shortest_edge_size,
    split_tiles,
    to_pixels,
    unpadded_grid,
)

NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = LlavaOnevisionImageProcessorPil.image_grid_pinpoints

# (height, width): one pixel, slivers, one off the tile, the tile, ties of the pinpoints, photos.
SIZES = [
    (1, 1), (1, 2), (2, 1), (1, 50), (50, 1), (40, 3000), (64, 1024), (1024, 64), (331, 331), (332, 332), (335, 337),
    (336, 336), (337, 335), (336, 672), (672, 336), (384, 384), (671, 673), (1008, 336), (480, 640), (899, 1024),
]  # fmt: skip

sides, edges = st.integers(1, 120), st.integers(1, 60)


def picture(height, width, seed=0):
    """Noise: a resize that is off by a fraction of a pixel shows everywhere."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def config_of(processor, **family):
    """Our config from what their processor writes; `family`: the fields beyond CLIP's that the family has."""
    defaults = {**CLIP_DEFAULTS, "do_center_crop": False, "crop_size": None, **family}
    return ImageConfig.from_hf(processor.to_dict(), defaults)


def next_pair(**settings):
    theirs = LlavaNextImageProcessorPil(**settings)
    return theirs, config_of(theirs, image_grid_pinpoints=[[336, 336]])


def onevision_pair(**settings):
    theirs = LlavaOnevisionImageProcessorPil(**settings)
    return theirs, config_of(theirs, image_grid_pinpoints=[[384, 384]])


def their_pixels(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0]


# ---- CLIP, LLaVA-1.5, SigLIP, Video-LLaVA

PROCESSORS = {
    "llava-1.5": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
    "llava-1.5 padded": LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=336, do_pad=True),
    "siglip": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "crop larger than edge": CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 71, "width": 84}),
    "crop only": CLIPImageProcessorPil(do_resize=False, crop_size=113),
    "resize only": SiglipImageProcessorPil(size={"height": 31, "width": 50}, do_rescale=False, do_normalize=False),
    "no rescale": CLIPImageProcessorPil(do_rescale=False),
    "no normalise": CLIPImageProcessorPil(do_normalize=False),
    "odd numbers": CLIPImageProcessorPil(rescale_factor=0.0123, image_mean=[0.1, 0.2, 0.3], image_std=0.7, resample=1),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_to_pixels_equals_the_reference(name):
    processor = PROCESSORS[name]
    config = config_of(processor)
    for height, width in SIZES if name.startswith("llava") else SIZES[::4]:
        image = picture(height, width)
        ours, theirs = to_pixels(image, config), their_pixels(processor, image)
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert torch.equal(ours, theirs.float()), (height, width)


def test_to_pixels_equals_the_reference_of_video_llava():
    processor = VideoLlavaImageProcessor()
    for height, width in ((2, 1), (240, 320), (500, 224)):
        image = picture(height, width)
        theirs = processor(image, return_tensors="pt", return_legacy_image_output=False)["pixel_values"][0]
        assert torch.equal(to_pixels(image, config_of(processor)), theirs)


@given(sides, sides, edges, edges, edges, st.booleans(), st.sampled_from(range(6)))
def test_to_pixels_equals_the_reference_at_any_size(height, width, edge, crop_height, crop_width, pad, resample):
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": crop_height, "width": crop_width},
        do_pad=pad,
        resample=resample,
    )
    image = picture(height, width)
    assert torch.equal(to_pixels(image, config_of(processor)), their_pixels(processor, image))


@pytest.mark.parametrize(
    "wrong",
    [
        {"resample": 2}, {"do_pad": True}, {"do_center_crop": False}, {"do_rescale": False}, {"do_normalize": False},
        {"do_resize": False}, {"image_mean": 0.5}, {"image_std": 0.5}, {"rescale_factor": 1 / 256},
        {"size": {"height": 336, "width": 336}},
    ],
    ids=str,
)  # fmt: skip
def test_to_pixels_notices_every_field(wrong):
    processor, image = PROCESSORS["llava-1.5"], picture(480, 640)
    ours, theirs = to_pixels(image, config_of(processor).override(wrong)), their_pixels(processor, image)
    assert ours.shape != theirs.shape or not torch.equal(ours, theirs)


def test_normalise_rounds_as_the_reference_does():
    """The order matters in the last bit: rescale in float64, then normalise in float32."""
    config = config_of(PROCESSORS["llava-1.5"])
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    ours = images.normalise(Image.fromarray(levels), config)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    assert torch.equal(ours, their_pixels(processor, Image.fromarray(levels)))
    mean, std = (np.array(numbers)[:, None, None] for numbers in (config.image_mean, config.image_std))
    all_in_float64 = (np.moveaxis(levels, -1, 0) / 255 - mean) / std
    assert not np.array_equal(ours.numpy(), all_in_float64.astype(np.float32))


def test_normalise_does_not_hand_out_its_tables():
    config = config_of(PROCESSORS["llava-1.5"])
    first = to_pixels(picture(3, 3), config)
    first.mul_(0)
    assert torch.equal(to_pixels(picture(3, 3), config), their_pixels(PROCESSORS["llava-1.5"], picture(3, 3)))


def test_shortest_edge_size_cuts_and_does_not_round():
    """336 * 500 / 337 = 498.5…, and 336 * 3 / 7 = 144 exactly."""
    assert shortest_edge_size((337, 500), 336) == (336, 498)
    assert shortest_edge_size((500, 337), 336) == (498, 336)
    assert shortest_edge_size((7, 3), 144) == (336, 144)


def test_center_crop_puts_odd_remainders_where_the_reference_does():
    """5 -> 2: one pixel off above, two below; 2 -> 5: two black rows above, one below."""
    image = Image.fromarray(np.arange(1, 6, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(3, 2))
    assert np.asarray(center_crop(image, (2, 2)))[:, 0, 0].tolist() == [2, 3]
    assert np.asarray(center_crop(image, (5, 5)))[0, :, 0].tolist() == [0, 0, 1, 1, 0]


# ---- very long pictures


@pytest.mark.parametrize(("height", "width"), [(300, 4), (4, 300), (1, 900), (900, 1), (7, 3), (336, 3), (5, 5)])
@pytest.mark.parametrize("resample", [0, 2, 3, 1])
def test_to_pixels_of_a_long_picture_equals_the_whole_resize(height, width, resample, monkeypatch):
    config, image = config_of(PROCESSORS["llava-1.5"]).override({"resample": resample}), picture(height, width)
    whole = to_pixels(image, config)
    monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", 0)
    middle = to_pixels(image, config)
    assert middle.shape == whole.shape
    one_level = 1.01 / 255 / min(config.image_std)
    assert (middle - whole).abs().max() <= one_level
    assert (middle != whole).float().mean() < 0.01


def test_to_pixels_of_a_20000_to_1_picture_needs_no_gigabytes():
    config = config_of(PROCESSORS["llava-1.5"])
    for height, width in ((1, 20_000), (20_000, 1)):
        image = Image.new("RGB", (width, height), (10, 20, 30))
        pixels = to_pixels(image, config)
        assert torch.equal(pixels, to_pixels(Image.new("RGB", (336, 336), (10, 20, 30)), config))


def test_resize_refuses_what_memory_cannot_hold():
    config = config_of(PROCESSORS["llava-1.5"]).override({"do_center_crop": False})
    with pytest.raises(MinivlmError, match="1 x 20000 pixels would be resized to 336 x 6720000"):
        to_pixels(picture(1, 20_000), config)
    with pytest.raises(MinivlmError, match="not height and width"):
        to_pixels(picture(3, 3), config.override({"size": {"shortest_edge": 3, "longest_edge": 9}}))


def test_expand_to_square_refuses_what_memory_cannot_hold():
    with pytest.raises(MinivlmError, match="1 x 25000 pixels is too long to pad"):
        expand_to_square(picture(1, 25_000), (0, 0, 0))


# ---- anyres: tiles


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_anyres_tiles_equal_the_reference_of_llava_next(height, width):
    processor, config = next_pair(size={"shortest_edge": 336}, crop_size=336)
    image = picture(height, width)
    ours, theirs = anyres_tiles(image, config), their_pixels(processor, image)
    rows, columns = anyres_grid((height, width), config.image_grid_pinpoints, config.tile)
    assert ours.shape == (1 + rows * columns, 3, 336, 336)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (500, 1), (40, 3000), (384, 384), (385, 769), (899, 1024)])
def test_anyres_tiles_equal_the_reference_of_llava_onevision(height, width):
    processor, config = onevision_pair()
    image = picture(height, width)
    assert torch.equal(anyres_tiles(image, config), their_pixels(processor, image))


def test_to_pixels_with_do_pad_is_the_view_of_llava_onevision_among_several_pictures():
    processor, config = onevision_pair()
    pictures = [picture(30, 41), picture(90, 20)]
    theirs = processor([pictures], return_tensors="pt")["pixel_values"]  # (I, 1, 3, 384, 384)
    ours = [to_pixels(image, dataclasses.replace(config, do_pad=True)) for image in pictures]
    assert torch.equal(torch.stack(ours)[:, None], theirs)


SMALL = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]}


@given(sides, sides, st.sampled_from(range(6)))
def test_anyres_tiles_equal_the_reference_at_any_size(height, width, resample):
    image = picture(height, width)
    for processor, config in (
        next_pair(size={"shortest_edge": 24}, crop_size=24, resample=resample, **SMALL),
        next_pair(size={"height": 24, "width": 24}, crop_size=24, resample=resample, do_resize=False, **SMALL),
        next_pair(size={"shortest_edge": 30}, crop_size=24, resample=resample, **SMALL),
        onevision_pair(size={"height": 24, "width": 24}, resample=resample, **SMALL),
    ):
        assert torch.equal(anyres_tiles(image, config), their_pixels(processor, image))


def test_anyres_tiles_notice_what_could_go_wrong():
    processor, config = next_pair(size={"shortest_edge": 24}, crop_size=24, **SMALL)
    image = picture(50, 71)
    theirs = their_pixels(processor, image)
    assert torch.equal(anyres_tiles(image, config), theirs)

    def wrong(**change):
        with pytest.MonkeyPatch.context() as patch:
            for name, replacement in change.items():
                patch.setattr(images, name, replacement)
            ours = anyres_tiles(image, config)
        return ours.shape != theirs.shape or not torch.equal(ours, theirs)

    def cut(size, target):  # int() where ceil() belongs
        scale = min(target[0] / size[0], target[1] / size[1])
        return int(size[0] * scale), int(size[1] * scale)

    def columns_first(image, tile):
        tiles = split_tiles(image, tile)
        return [tiles[i] for i in (0, 2, 1, 3)]

    def in_the_corner(image, size, colour):
        canvas = Image.new("RGB", size[::-1], colour)
        canvas.paste(image)
        return canvas

    assert wrong(fitted_size=cut)
    assert wrong(split_tiles=columns_first)
    assert wrong(_centred=in_the_corner)
    assert wrong(select_best_resolution=lambda _size, _pinpoints: (24, 72))
    turned = dataclasses.replace(config, image_grid_pinpoints=tuple((w, h) for h, w in config.image_grid_pinpoints))
    tall = picture(20, 20)
    assert not torch.equal(anyres_tiles(tall, turned), anyres_tiles(tall, config)), "order breaks the tie"


def test_anyres_pads_the_smaller_half_first_and_black():
    """A white 1 x 3 picture on a 24 x 24 canvas is 8 rows high: 8 black above, 8 below; at 7 rows: 8 above, 9 below."""
    assert fitted_size((1, 3), (24, 24)) == (8, 24)
    canvas = images._centred(Image.new("RGB", (24, 7), "white"), (24, 24), (0, 0, 0))
    assert np.asarray(canvas)[:, 5, 1].tolist() == [0] * 8 + [255] * 7 + [0] * 9


# ---- anyres: grids


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([NEXT_PINPOINTS, ONEVISION_PINPOINTS]))
def test_grid_and_fitted_size_equal_the_reference(height, width, pinpoints):
    size, tile = (height, width), pinpoints[0][0]
    best = select_best_resolution(size, pinpoints)
    assert best == their_best_resolution(size, pinpoints)
    assert anyres_grid(size, pinpoints, tile) == get_anyres_image_grid_shape(size, pinpoints, tile)
    fitted = fitted_size(size, best)
    assert fitted == get_patch_output_size(np.empty((3, *size)), best, ChannelDimension.FIRST)


def test_anyres_grid_refuses_pinpoints_that_are_no_whole_tiles():
    with pytest.raises(MinivlmError, match="image_grid_pinpoints: 336 x 700"):
        anyres_grid((5, 5), [(336, 700)], 336)


def test_select_best_resolution_lets_the_first_win_a_tie():
    """Up to 331 x 331 both halves of 336 x 672 keep every pixel and waste the same: the list's order decides, so that
    the original repositories, which read the same list as (width, height), choose the other."""
    original = [(height, width) for width, height in NEXT_PINPOINTS]
    assert select_best_resolution((331, 331), NEXT_PINPOINTS) == (336, 672)
    assert select_best_resolution((331, 331), original) == (672, 336)
    for size in ((400, 400), (1024, 64), (300, 900)):
        assert select_best_resolution(size, NEXT_PINPOINTS) == select_best_resolution(size, original)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([NEXT_PINPOINTS, ONEVISION_PINPOINTS]))
def test_unpadded_grid_equals_the_reference(height, width, pinpoints):
    tile, patches = (336, 24) if pinpoints is NEXT_PINPOINTS else (384, 27)
    tile_rows, tile_columns = anyres_grid((height, width), pinpoints, tile)
    grid = (tile_rows * patches, tile_columns * patches)
    cells = torch.arange(grid[0] * grid[1]).view(1, *grid)  # (1, rows, columns)
    top, left, rows, columns = unpadded_grid((height, width), grid)
    assert torch.equal(cells[:, top : top + rows, left : left + columns], unpad_image(cells, (height, width)))


def test_unpadded_grid_needs_the_rounding_to_be_exact():
    """55 x 88 on 24 x 24 patches shows 55 * 24 / 88 = 15 rows: bars of 9 // 2 = 4. In floats it is 14.999999999999998,
    of which the original repositories' int() makes 14 rows and bars of 5."""
    wrong = []
    for height in range(1, 300):
        for width in range(height + 1, 300):
            bar = (24 - height * 24 // width) // 2  # in integers
            assert unpadded_grid((height, width), (24, 24)) == (bar, 0, 24 - 2 * bar, 24)
            if unpadded_grid((height, width), (24, 24), round_first=False)[0] != bar:
                wrong.append((height, width))
    assert wrong == [(55, 88), (110, 176)]


@pytest.mark.parametrize(
    ("size", "grid", "expected"),
    [
        ((1024, 64), (72, 24), (0, 10, 72, 4)),  # 4.5 columns of picture: int 4, 20 // 2 off both sides
        ((64, 1024), (24, 72), (10, 0, 4, 72)),
        ((1, 4000), (24, 72), (12, 0, 0, 72)),  # no row is left
        ((331, 331), (48, 24), (12, 0, 24, 24)),
        ((672, 672), (48, 48), (0, 0, 48, 48)),
        ((671, 672), (48, 48), (0, 0, 48, 48)),  # 47.93 rows: 47, but the odd row of bar stays
    ],
)
@pytest.mark.parametrize("round_first", [True, False])
def test_unpadded_grid_by_hand(size, grid, expected, round_first):
    assert unpadded_grid(size, grid, round_first=round_first) == expected


# ---- the original repositories' rules, where they differ


def test_expand_to_square_pads_with_the_mean_colour():
    assert mean_colour(config_of(PROCESSORS["llava-1.5"])) == (122, 116, 104)
    image = Image.new("RGB", (5, 2), "white")
    ours = np.asarray(expand_to_square(image, (122, 116, 104)))
    assert ours.shape == (5, 5, 3)
    assert ours[:, 2, 0].tolist() == [122, 255, 255, 122, 122]
    tall = expand_to_square(image.rotate(90, expand=True), (122, 116, 104))
    assert np.array_equal(np.asarray(tall), ours.swapaxes(0, 1))
    assert expand_to_square(ours_square := Image.fromarray(ours), (0, 0, 0)) is ours_square


def original_tiles(image, pinpoints, tile):
    """The original repositories' anyres, from their description: pinpoints (width, height), resize with ceil() and
    Pillow's default filter, centred on black, cut row by row, the whole picture squashed to the square in front."""
    width, height = image.size
    options = []
    for target_width, target_height in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        options.append((-kept, target_width * target_height - kept, len(options)))
    target_width, target_height = pinpoints[min(options)[2]]
    if target_width / width < target_height / height:
        new = target_width, min(math.ceil(height * (target_width / width)), target_height)
    else:
        new = min(math.ceil(width * (target_height / height)), target_width), target_height
    canvas = Image.new("RGB", (target_width, target_height))
    canvas.paste(image.resize(new), ((target_width - new[0]) // 2, (target_height - new[1]) // 2))
    views = [image.resize((tile, tile))]
    for top in range(0, target_height, tile):
        views += [canvas.crop((x, top, x + tile, top + tile)) for x in range(0, target_width, tile)]
    clip = CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=tile)
    return torch.stack([their_pixels(clip, view) for view in views])


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if max(size) != 3000])
def test_anyres_tiles_equal_the_original_repositories_with_their_pinpoints_turned(height, width):
    _, config = next_pair(size={"shortest_edge": 336}, crop_size=336)
    turned = dataclasses.replace(config, image_grid_pinpoints=tuple((h, w) for w, h in NEXT_PINPOINTS))
    image = picture(height, width)
    theirs = original_tiles(image, NEXT_PINPOINTS, 336)
    assert torch.equal(anyres_tiles(image, turned), theirs)
    if (height, width) == (331, 331):
        assert not torch.equal(anyres_tiles(image, config), theirs), "the tie goes to the other grid"


def test_resize_returns_the_picture_itself_when_it_fits():
    image = picture(5, 6)
    assert resize(image, (5, 6), 3) is image
    assert resize(image, (6, 5), 3).size == (5, 6)


def test_config_mean_is_the_published_one():
    assert tuple(CLIPImageProcessorPil.image_mean) == CLIP_MEAN
