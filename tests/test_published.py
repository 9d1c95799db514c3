"""Every published checkpoint, without its weights: config.json as it stands on the hub → each tensor's name and shape.

This is where a layout error shows before someone downloads 14 GB. `published/owner--name.json` hold what the public
pages say, gaps included. What belongs in the files follows from transformers' classes, whose names of today are written
back to the hub's by the tables here, and for the original LLaVA repository from its parts.
"""

import importlib
import json
import re
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
import transformers

from minivlm.hub import ALIASES, GIGABYTES
from minivlm.models import MODULES, llava_original
from minivlm.weights import _published

CONFIGS = {
    path.stem.replace("--", "/"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "published").glob("*.json"))
}
ORIGINALS = [name for name, config in CONFIGS.items() if llava_original.is_original(config)]
CONVERTED = [name for name in CONFIGS if name not in ORIGINALS]

# transformers' names in memory → the hub's, by family: (pattern, replacement), applied in this order.
LLAVA = (
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.(vision|image|video)_tower\.(vision_model\.)?", r"\1_tower.vision_model."),
    (r"^model\.", ""),
)
HUB_NAMES = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "video_llava": LLAVA,
    "llava_onevision": LLAVA,
    "qwen2_vl": ((r"^model\.visual", "visual"), (r"^model\.language_model", "model")),
    "mllama": (
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model", "language_model.model"),
        (r"^model\.", ""),
    ),
}
# Bytes in the published index files, as far as they are known.
TOTAL_BYTES = {"llava-hf/llava-1.5-7b-hf": 14_126_854_144}


def theirs(config):
    """Name → shape, of transformers' model under the hub's names; a tied head is not in the files."""
    config = json.loads(json.dumps(config))  # they write into it
    family, tied = config["model_type"], config.get("tie_word_embeddings", False)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
    found = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in HUB_NAMES[family]:
            name = re.sub(pattern, replacement, name)
        if not (tied and name.endswith("lm_head.weight")):
            found[name] = tuple(tensor.shape)
    return found


def ours(config, keys=None):
    """Name → shape, of minivlm's model under the first spelling of its KEYS (or of `keys`)."""
    family = importlib.import_module(MODULES[config["model_type"]])
    with torch.device("meta"):
        model = family.Model.from_config(config)
    names = {_published(name, keys or family.KEYS): tuple(t.shape) for name, t in model.state_dict().items()}
    assert len(names) == len(model.state_dict())
    return names


def difference(ours, theirs):
    """What a reader needs to see; the whole would be thousands of lines."""
    return sorted(set(ours.items()) ^ set(theirs.items()))[:8]


def num_bytes(shapes):
    return 2 * sum(map(prod, shapes.values()))


@cache
def shapes(name):
    return ours(CONFIGS[name])


@pytest.mark.parametrize("name", CONVERTED)
def test_tensors_are_the_published_ones(name):
    assert difference(shapes(name), theirs(CONFIGS[name])) == []


def test_another_config_has_other_tensors():
    config = CONFIGS["llava-hf/llava-1.5-7b-hf"]
    fewer = config | {"text_config": config["text_config"] | {"num_key_value_heads": 8}}
    assert difference(shapes("llava-hf/llava-1.5-7b-hf"), ours(fewer)) != []
    without = {**llava_original.KEYS, "vision_tower": ("vision_tower",)}
    assert difference(ours(config, without), ours(config)) != []


@pytest.mark.parametrize("name", sorted(TOTAL_BYTES.keys() & set(CONVERTED)))
def test_bytes_are_those_of_the_published_index(name):
    assert num_bytes(shapes(name)) == TOTAL_BYTES[name]


@pytest.mark.parametrize("name", sorted(GIGABYTES.keys() & set(CONVERTED)))
def test_the_list_tells_the_size(name):
    """What `--list` shows is what a download of the weights takes, to the figure that it shows."""
    assert round(num_bytes(shapes(name)) / 1e9, 1) == GIGABYTES[name]


def test_every_alias_has_its_config_here():
    assert set(ALIASES.values()) <= set(CONVERTED)


def test_every_family_is_tested():
    """Were a family built and its checkpoints not here, they would go untested: write them from the public pages."""
    text_only = {"mllama_text_model"}  # what people save of a family, and nobody publishes
    assert {CONFIGS[name]["model_type"] for name in CONVERTED} == set(HUB_NAMES) == set(MODULES) - text_only


# One checkpoint of each later family, and names that its files are known to hold.
KNOWN_NAMES = {
    "LanguageBind/Video-LLaVA-7B-hf": (
        "image_tower.vision_model.embeddings.class_embedding", "video_tower.vision_model.post_layernorm.bias",
        "language_model.model.embed_tokens.weight", "multi_modal_projector.linear_2.weight",
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        "vision_tower.vision_model.embeddings.patch_embedding.bias", "image_newline",
        "language_model.model.layers.23.self_attn.k_proj.bias",
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        "visual.patch_embed.proj.weight", "visual.blocks.31.attn.qkv.bias", "visual.merger.mlp.2.weight",
        "model.layers.27.self_attn.q_proj.bias",
    ),
    "meta-llama/Llama-3.2-11B-Vision": (
        "vision_model.gated_positional_embedding.gate", "vision_model.global_transformer.layers.7.gate_attn",
        "language_model.model.layers.3.cross_attn_attn_gate", "language_model.model.layers.38.cross_attn.q_norm.weight",
        "multi_modal_projector.weight", "language_model.lm_head.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_the_tables_give_the_known_names(name):
    found = theirs(CONFIGS[name])
    assert [known for known in KNOWN_NAMES[name] if known not in found] == []
    assert round(num_bytes(found) / 1e9, 1) == GIGABYTES[name]


# --- the original repository's ----------------------------------------------------------------------------------------

TEXT_CLASSES = {"LlavaLlamaForCausalLM": "Llama", "LlavaMistralForCausalLM": "Mistral"}
CLIP_LARGE = transformers.CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14,
)  # fmt: skip


def original_parts(config):
    """Name → shape: the text model as it is called alone, the list of a projector, 1.6's tower and newline."""
    kind, D = TEXT_CLASSES[config["architectures"][0]], config["hidden_size"]
    with torch.device("meta"):
        text = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
        tower = transformers.CLIPVisionModel(CLIP_LARGE)
    found = {name: tuple(tensor.shape) for name, tensor in text.state_dict().items()}
    for i, width in ((0, 1024), (2, D)):
        found |= {f"model.mm_projector.{i}.weight": (D, width), f"model.mm_projector.{i}.bias": (D,)}
    if config["image_aspect_ratio"] == "anyres":
        found["model.image_newline"] = (D,)
        for name, tensor in tower.state_dict().items():
            if not name.endswith("position_ids"):
                inner = name.removeprefix("vision_model.")
                found[f"model.vision_tower.vision_tower.vision_model.{inner}"] = tuple(tensor.shape)
    return found


@pytest.mark.parametrize("name", ORIGINALS)
def test_tensors_of_the_originals_are_the_published_ones(name):
    config = CONFIGS[name]
    sizes = llava_original.tower_sizes(config["mm_vision_tower"], None)
    hub = llava_original.to_hub(config, sizes, image_token_id=config["vocab_size"])
    found = ours(hub, llava_original.KEYS)
    if hub["model_type"] == "llava":  # 1.5's tower lies elsewhere
        inside = {tensor for tensor in found if tensor.startswith(llava_original.INSIDE)}
        assert len(inside) == 391  # 24 · 16 + 7, as in a CLIP-L of its own
        found = {tensor: shape for tensor, shape in found.items() if tensor not in inside}
    assert difference(found, original_parts(config)) == []
    assert hub["image_token_index"] == config["vocab_size"]  # and not the 64002 that one of them names


def test_the_originals_are_the_conversions_twins():
    """Apart from the rows of the new words, the conversion has every number of the original, and no other."""
    pairs = {"liuhaotian/llava-v1.5-7b": "llava-1.5-7b-hf", "liuhaotian/llava-v1.6-34b": "llava-v1.6-34b-hf"}
    for original, conversion in pairs.items():
        config = CONFIGS[original]
        hub = llava_original.to_hub(config, llava_original.tower_sizes(config["mm_vision_tower"], None), 0)
        more = num_bytes({"embed_tokens": (64, config["hidden_size"]), "lm_head": (64, config["hidden_size"])})
        assert num_bytes(ours(hub)) + more == num_bytes(shapes(f"llava-hf/{conversion}"))
