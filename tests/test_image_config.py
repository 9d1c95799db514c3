"""ImageConfig: every published layout is read, every field is honoured or refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import image_processing_utils
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from minivlm.errors import MinivlmError
from minivlm.image_config import BOOKKEEPING, CLIP_DEFAULTS, CLIP_MEAN, ImageConfig, Size

# One default for each field that some family has; a model's file lists only its own.
ANY_FAMILY = {
    **CLIP_DEFAULTS,
    "do_center_crop": False,
    "image_grid_pinpoints": [[336, 672]],
    "max_image_tiles": 4,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}

PUBLISHED = {  # llava-hf/llava-1.5-7b-hf, as the hub has it
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}


def read(hf=None, defaults=CLIP_DEFAULTS, overrides=None):
    return ImageConfig.from_hf(hf or {}, defaults, overrides)


def test_config_reads_the_published_file():
    config = read(PUBLISHED)
    assert (config.size, config.crop_size, config.tile) == (Size(shortest_edge=336), (336, 336), 336)
    assert (config.image_mean, config.resample, config.rescale_factor) == (CLIP_MEAN, 3, 1 / 255)
    assert config.do_resize and config.do_center_crop and config.do_rescale and config.do_normalize
    assert not config.do_pad and config.image_grid_pinpoints is None


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil,
        SiglipImageProcessorPil, MllamaImageProcessorPil, Qwen2VLImageProcessorPil, VideoLlavaImageProcessor,
    ],
)  # fmt: skip
def test_config_reads_what_transformers_writes(processor, tmp_path):
    processor().save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "preprocessor_config.json").read_text())
    ours = ImageConfig.from_folder(tmp_path, ANY_FAMILY)
    assert ours.size.given() == theirs["size"]
    for field in ("do_resize", "resample", "rescale_factor", "patch_size", "max_image_tiles", "do_pad"):
        assert getattr(ours, field) == theirs.get(field, ANY_FAMILY[field]), field
    assert list(ours.image_mean) == theirs["image_mean"]


def test_config_prefers_the_processor_config_of_transformers_5(tmp_path):
    assert ImageConfig.from_folder(tmp_path, CLIP_DEFAULTS) == read()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    assert ImageConfig.from_folder(tmp_path, CLIP_DEFAULTS).tile == 336
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert ImageConfig.from_folder(tmp_path, CLIP_DEFAULTS).tile == 336
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**PUBLISHED, "crop_size": 224}}))
    assert ImageConfig.from_folder(tmp_path, CLIP_DEFAULTS).tile == 224
    assert ImageConfig.from_folder(tmp_path, CLIP_DEFAULTS, {"crop_size": 448}).tile == 448


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_config_refuses_a_damaged_file_in_one_line(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(MinivlmError, match="preprocessor_config.json is damaged") as caught:
        ImageConfig.from_folder(tmp_path, CLIP_DEFAULTS)
    assert "\n" not in str(caught.value)


def test_config_takes_null_as_not_given():
    assert read(dict.fromkeys(PUBLISHED)) == read()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("size", 336, Size(shortest_edge=336)),
        ("size", [336, 448], Size(336, 448)),
        ("size", {"height": 336, "width": 448}, Size(336, 448)),
        ("size", {"shortest_edge": 3136, "longest_edge": 12845056}, Size(None, None, 3136, 12845056)),
        ("crop_size", 336, (336, 336)),
        ("crop_size", [336, 448], (336, 448)),
        ("crop_size", {"width": 448, "height": 336}, (336, 448)),
        ("image_mean", 0.5, (0.5, 0.5, 0.5)),
        ("image_std", [1, 2, 3], (1.0, 2.0, 3.0)),
        ("rescale_factor", 1, 1.0),
        ("image_grid_pinpoints", [[336, 672], (672, 336)], ((336, 672), (672, 336))),
    ],
)
def test_config_reads_every_spelling(field, value, expected):
    assert getattr(read({field: value}, ANY_FAMILY), field) == expected
    assert getattr(read({}, ANY_FAMILY, {field: value}), field) == expected
    assert getattr(read({}, ANY_FAMILY).override({field: value}), field) == expected


def test_config_reads_an_integer_size_as_default_to_square_says():
    assert read({"size": 336, "default_to_square": True}).size == Size(336, 336)
    assert read({"size": 336, "default_to_square": False}).size == Size(shortest_edge=336)
    assert image_processing_utils.get_size_dict(336, default_to_square=True) == {"height": 336, "width": 336}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", {"longest_edge": 336}), ("size", {"height": 336}), ("size", {}), ("size", {"max_height": 3}),
        ("size", 0), ("size", "336"), ("size", True), ("size", [1, 2, 3]), ("size", {"height": 10**6, "width": 1}),
        ("crop_size", -1), ("crop_size", {"height": 336}), ("crop_size", {"height": 3, "width": 3, "depth": 3}),
        ("crop_size", 10**9), ("crop_size", 336.0),
        ("resample", 99), ("resample", "bicubic"), ("resample", [3]), ("resample", {}),
        ("do_resize", 1), ("do_normalize", "yes"), ("do_convert_rgb", False), ("data_format", "channels_last"),
        ("rescale_factor", "1/255"), ("rescale_factor", float("nan")), ("rescale_factor", 10**400),
        ("image_mean", [0.5, 0.5]), ("image_mean", "0.5"), ("image_std", [0.5, 0, 0.5]), ("image_std", {}),
        ("image_grid_pinpoints", []), ("image_grid_pinpoints", [336, [672]]), ("image_grid_pinpoints", "(1x1)"),
        ("pad_size", {"height": 3, "width": 3}), ("max_image_tiles", 0), ("min_pixels", 10**400),
        ("colour", "red"),
    ],
)  # fmt: skip
def test_config_refuses_by_name(field, value):
    for refusing in (
        lambda: read({field: value}, ANY_FAMILY),
        lambda: read({}, ANY_FAMILY, {field: value}),
        lambda: read({}, ANY_FAMILY).override({field: value}),
    ):
        with pytest.raises(MinivlmError, match=field) as caught:
            refusing()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("field", ["image_grid_pinpoints", "max_image_tiles", "min_pixels", "patch_size", "merge_size"])
def test_config_refuses_fields_of_other_families(field):
    for refusing in (
        lambda: read({field: ANY_FAMILY[field]}),
        lambda: read({}, overrides={field: ANY_FAMILY[field]}),
        lambda: read().override({field: ANY_FAMILY[field]}),
    ):
        with pytest.raises(MinivlmError, match=field):
            refusing()


def test_config_names_what_is_missing():
    with pytest.raises(MinivlmError, match="lacks do_resize, size, resample"):
        read({}, {})
    with pytest.raises(MinivlmError, match="lacks crop_size"):
        read({}, {**CLIP_DEFAULTS, "crop_size": None})
    with pytest.raises(MinivlmError, match="lacks crop_size"):
        read({}, {**CLIP_DEFAULTS, "crop_size": None, "do_center_crop": False}).override({"do_center_crop": True})


def test_config_ignores_bookkeeping():
    assert read(dict.fromkeys(BOOKKEEPING, "anything")) == read()


def test_config_pads_to_a_square_only_where_that_processor_does():
    """CLIP's `do_pad` brings a batch to one size, which its pictures have anyway; LLaVA's makes a square."""
    assert not read({"do_pad": True, "image_processor_type": "CLIPImageProcessor"}).do_pad
    assert read({"do_pad": True, "image_processor_type": "LlavaImageProcessor"}).do_pad
    assert read({**PUBLISHED}, overrides={"do_pad": True}).do_pad


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge", "x"]), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*ANY_FAMILY, *BOOKKEEPING, "data_format", "x"]), JSON, max_size=4))
def test_config_is_read_or_refused_in_one_line_whatever_it_holds(hf):
    try:
        read(hf, ANY_FAMILY)
    except MinivlmError as error:
        assert "\n" not in str(error)
