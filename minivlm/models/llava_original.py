"""The checkpoints of the original LLaVA repository (liuhaotian/llava-v1.5-*, llava-v1.6-*), with its own processing.

The models are those of `llava.py` and `llava_next.py`; here they are only written down, and fed, in another way:

| | llava-hf's conversions | the originals |
|---|---|---|
| config.json | text_config, vision_config | the text model's fields at the top, `mm_*` for the rest |
| vision tower | inside | 1.5: in the place that `mm_vision_tower` names; 1.6: inside, but without its sizes |
| `<image>` | a row of the embedding table | no row at all: index −200 there, here a token behind the vocabulary |
| a picture, 1.5 | its middle square | all of it, padded to a square with the mean colour |
| pinpoints, 1.6 | (height, width) | (width, height): small squares become a portrait grid, not a landscape one |
| unpadding, 1.6 | int(round(x, 7)) | int(x): a line fewer where x is 23.999999999999996 |
| prompt | no system sentence, no </s> | both |

So this file turns such a folder into what those models already understand: a config in the hub's form, the table of its
key names, and the three parts of a processor. `vlm.load` finds the files and puts them together.

Does not: read Video-LLaVA's and LLaVA-OneVision's original repositories, which grew out of it and have their own files.
Source: github.com/haotian-liu/LLaVA, `mm_utils.py`, `llava_arch.py`, `conversation.py`, `eval/run_llava.py`.

Sections: what a config says, key names, prompts, all together, saving.
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.files import read_json
from minivlm.image_config import ImageConfig
from minivlm.models.llava import CLIP_LARGE, LlavaConfig, image_defaults
from minivlm.text import Tokenizer
from minivlm.vit import ViTConfig

IMAGE = "<image>"
KNOWN_TOWER = "openai/clip-vit-large-patch14-336"  # its sizes are CLIP_LARGE, its image settings CLIP's defaults


# ------------------------------------------------------------------------------------------------- what a config says

# By `architectures`, or by `model_type` where a file names none: the decoder that the flat fields describe.
TEXT_MODELS = {
    "LlavaLlamaForCausalLM": "llama",
    "llava": "llama",
    "llava_llama": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "llava_mistral": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "llava_qwen": "qwen2",
}


def is_original(config: dict) -> bool:
    """Whether a config.json is of that repository: only there the multimodal fields are called `mm_*`."""
    return "text_config" not in config and any(key.startswith("mm_") for key in config)


def architecture(config: dict) -> str:
    """A key of TEXT_MODELS, if the model is one that minivlm knows."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else config["model_type"]


def is_onevision(config: dict) -> bool:
    """Whether it is a LLaVA-OneVision, which llava_onevision_original.py reads."""
    return str(config.get("image_aspect_ratio")).startswith("anyres_max")


def tower_name(config: dict) -> str:
    """Hub id or folder of the vision tower."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise MinivlmError(
            f"config.json: mm_vision_tower must name the vision tower, not {name!r}; of other original repositories "
            "than LLaVA's, use the hub's conversion (its name ends in -hf)"
        )
    return name


def to_hub(config: dict, vision: dict, image_token_id: int) -> dict:
    """The config.json that the hub's conversion of this model would have, and two settings that it never needs:
    `projector_depth` and `round_unpadding`.

    `vision`: the tower's sizes. What belongs to training, and stray fields such as 1.6-34b's `image_token_index`, which
    that repository never reads, are left out; what would change the answer and is not known here is refused by name.
    """
    name = architecture(config)
    aspect = config.get("image_aspect_ratio") or "square"
    anyres = aspect == "anyres"
    feature = config.get("mm_vision_select_feature", "patch")
    merge = config.get("mm_patch_merge_type") or "flat"
    check_field("architectures", name, TEXT_MODELS)
    check_field("image_aspect_ratio", aspect, ("square", "pad", "anyres"))
    check_field("mm_vision_select_feature", feature, ("patch",) if anyres else ("patch", "cls_patch"))
    check_field("mm_patch_merge_type", merge, ("spatial_unpad",) if anyres else ("flat",))
    check_field("mm_resampler_type", config.get("mm_resampler_type"), (None,))
    check_field("s2", config.get("s2", False), (False,))
    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise MinivlmError(f"config.json: mm_vision_select_layer is {layer!r}, not the number of a layer")
    theirs = ("mm_", "image_", "architectures", "model_type")  # the last two of the whole, the others of pictures
    text = {key: value for key, value in config.items() if not any(word in key for word in theirs)}
    hub = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "image_token_index": image_token_id,
        "text_config": text | {"model_type": TEXT_MODELS[name]},
        "vision_config": {"model_type": "clip_vision_model"} | vision,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if feature == "patch" else "full",
        "projector_hidden_act": "gelu",
        "projector_depth": projector_depth(config.get("mm_projector_type") or "linear"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "torch_dtype": config.get("torch_dtype"),
    }
    if anyres:
        hub |= {"image_grid_pinpoints": pinpoints(config.get("image_grid_pinpoints")), "round_unpadding": False}
    return hub


def check_field(field: str, value: object, known: "tuple | dict") -> None:
    """Refuses what would change the answer and is not known here."""
    if value not in list(known):
        choices = " or ".join(map(str, known))
        raise MinivlmError(f"config.json of an original checkpoint: {field} is {value!r}; minivlm knows {choices}")


def projector_depth(kind: str) -> int:
    """Linear layers of the projector: `linear` has one, `mlp2x_gelu` two."""
    found = re.fullmatch(r"mlp([1-9])x_gelu", kind) if isinstance(kind, str) else None
    if found is None:
        check_field("mm_projector_type", kind, ("linear", "mlp2x_gelu"))
    return int(found[1]) if found else 1


def pinpoints(value: object) -> list[list[int]]:
    """The list, which some files hold as a string, turned from (width, height) to (height, width)."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return [[int(height), int(width)] for width, height in pairs]
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        told = f"config.json: image_grid_pinpoints is {repr(value)[:80]}, not a list of (width, height)"
        raise MinivlmError(told) from error


def tower_sizes(name: str, folder: Path | None) -> dict:
    """The numbers of the tower: from its own config.json, else (`folder` None) those of the one known tower."""
    if folder is None:
        return CLIP_LARGE
    config = read_json(folder / "config.json")
    check_field(f"the vision tower {name}", config.get("model_type", "clip"), ("clip", "clip_vision_model"))
    return config.get("vision_config") or config


# ------------------------------------------------------------------------------------------------------------ key names

# Parameter prefixes here → there, see weights.py. A linear projector is the module itself, an MLP a list with
# activations at the odd places.
KEYS = {
    "language_model": ("model",),
    "language_model.lm_head": ("lm_head",),
    "vision_tower": ("model.vision_tower.vision_tower.vision_model",),
    "multi_modal_projector.linear_1": ("model.mm_projector.0", "model.mm_projector"),
    **{f"multi_modal_projector.linear_{i}": (f"model.mm_projector.{2 * i - 2}",) for i in range(2, 10)},
    "image_newline": ("model.image_newline",),
}
INSIDE = "model.vision_tower."  # what the tensors of a tower start with, where the checkpoint has one of its own

# A CLIP or SigLIP of its own: both halves, of which only the one that sees is read, without the head that pools; or
# that one alone, as transformers 5 saves.
TOWER_KEYS = {"": ("vision_model", "")}
NOT_TOWER = ("text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias", "head")


# -------------------------------------------------------------------------------------------------------------- prompts

_TEXT = " | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n')"
IMAGES = "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
_SAID = IMAGES + "{{ message.content" + _TEXT + " }}"
_ANSWER = "{% generation %}{{ message.content" + _TEXT + " }}END{% endgeneration %}"
_SYSTEM = "{{ messages[0].content" + _TEXT + " }}"


def _template(before: str, user: str, assistant: str, ask: str, end: str) -> str:
    """A chat template: what stands before the turns, the turns, what asks for an answer, and what closes one."""
    return (
        "{% set given = messages[0].role == 'system' %}" + before +
        "{% for message in (messages[1:] if given else messages) %}"
        "{% if message.role == 'user' %}" + user.replace("SAID", _SAID) +
        "{% elif message.role == 'assistant' %}" + assistant.replace("ANSWER", _ANSWER.replace("END", end)) +
        "{% else %}{{ raise_exception('after a system message only user and assistant may speak') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + ask + "{% endif %}"
    )  # fmt: skip


def _system(default: str) -> str:
    """The caller's system message in the place of the usual one."""
    return "{% if given %}" + _SYSTEM + "{% else %}" + default + "{% endif %}"


# By their names in that repository's conversation.py. Vicuna's sentence is the one that its run_llava.py takes
# (`llava_v1`); its `vicuna_v1` proper says "user" where this one says "human".
CONVERSATIONS = {
    "vicuna_v1": _template(
        _system(
            "A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions."
        ) + " ",
        "USER: SAID ", "ASSISTANT: ANSWER", "ASSISTANT:", "</s>",
    ),
    "mistral_instruct": _template(
        "", "[INST] {% if given and loop.first %}<<SYS>>\n" + _SYSTEM + "\n<</SYS>>\n\n{% endif %}SAID [/INST]",
        " ANSWER", "", " </s>",
    ),
    "chatml_direct": _template(
        "<|im_start|>system\n" + _system("Answer the questions.") + "<|im_end|>",
        "<|im_start|>user\nSAID<|im_end|>", "<|im_start|>assistant\nANSWER", "<|im_start|>assistant\n", "<|im_end|>",
    ),
    "llava_llama_3": _template(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + _system(
            "You are a helpful language and vision assistant. You are able to understand the visual content that the "
            "user provides, and assist the user with a variety of tasks using natural language."
        ) + "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{% set said %}SAID{% endset %}{{ said | trim }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nANSWER", "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "qwen_1_5": _template(
        "<|im_start|>system\n" + _system("You are a helpful assistant.") + "<|im_end|>\n",
        "<|im_start|>user\nSAID<|im_end|>\n", "<|im_start|>assistant\nANSWER", "<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "plain": _template("{% if given %}" + _SYSTEM + "{% endif %}", "SAID\n", "ANSWER", "", "\n"),
}  # fmt: skip


def conversation_of(config: dict, tokenizer: Tokenizer) -> str:
    """The key of CONVERSATIONS that a checkpoint was trained with; the original guesses it from the folder's name.

    plain, if only the projector was trained (`tune_mm_mlp_adapter`). For a Qwen, qwen_1_5. Else by the word that ends
    an answer, the one of `eos_token_id` in the vocabulary: `<|im_end|>` chatml_direct, `<|eot_id|>` or
    `<|end_of_text|>` llava_llama_3. Else (`</s>`) by the text architecture: Mistral's mistral_instruct, Llama's
    vicuna_v1.
    """
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    ends = {tokenizer.backend.id_to_token(index) for index in ids if index in range(tokenizer.vocab_size)}
    if config.get("tune_mm_mlp_adapter"):
        return "plain"
    if TEXT_MODELS[architecture(config)] == "qwen2":
        return "qwen_1_5"
    if "<|im_end|>" in ends:
        return "chatml_direct"
    if ends & {"<|eot_id|>", "<|end_of_text|>"}:
        return "llava_llama_3"
    return "mistral_instruct" if TEXT_MODELS[architecture(config)] == "mistral" else "vicuna_v1"


# --------------------------------------------------------------------------------------------------------- all together


@dataclass(frozen=True)
class Original:
    """A folder of an original repository in the terms of the models' files."""

    config: dict  # as `to_hub` gives it
    tokenizer: Tokenizer
    template: ChatTemplate
    images: ImageConfig
    keys: dict  # as KEYS


def read(folder: Path, config: dict, tower: Path | None) -> Original:
    """`config`: the folder's config.json. `tower`: the vision tower's folder, None for the known one's numbers."""
    vision = tower_sizes(tower_name(config), tower)
    marks = config.get("mm_use_im_start_end", False)
    tokenizer = Tokenizer.from_folder(folder, extra_tokens=[*(_marks(config) if marks else ()), IMAGE])
    hub = to_hub(config, vision, tokenizer.token_to_id(IMAGE))
    llava = LlavaConfig.from_hf(hub)
    if marks and tokenizer.token_to_id("<im_end>") >= llava.text.vocab_size:
        raise MinivlmError("config.json: mm_use_im_start_end is set, but the vocabulary has no rows for those tokens")
    template = CONVERSATIONS[conversation_of(config, tokenizer)]
    if marks:
        template = template.replace(IMAGE, f"<im_start>{IMAGE}<im_end>")
    # The tower's own settings; `do_pad` is not among a CLIP's, and here it says what LLaVA does before.
    settings = read_json(tower / "preprocessor_config.json") if tower else {}
    ours = {"do_pad": config.get("image_aspect_ratio") == "pad"}
    if "image_grid_pinpoints" in hub:
        ours["image_grid_pinpoints"] = hub["image_grid_pinpoints"]
    images = ImageConfig.from_hf(settings, image_defaults(llava) | ours, ours)
    return Original(hub, tokenizer, ChatTemplate.from_folder(folder, default=template), images, KEYS)


def _marks(config: dict) -> list[str]:
    """The tokens around a picture's, in the order in which the original appends those that a vocabulary lacks."""
    return [*(["<im_patch>"] if config.get("mm_use_im_patch_token", True) else []), "<im_start>", "<im_end>"]


# --------------------------------------------------------------------------------------------------------------- saving


def hub_rows(original: Original) -> dict[str, int]:
    """Rows of the embedding table and the head in a saved checkpoint: `<image>` needs one there, and 64s are custom."""
    config, vocab_size = original.config, original.config["text_config"]["vocab_size"]
    last = max(config["image_token_index"], config.get("video_token_index", 0))
    rows = vocab_size if last < vocab_size else -(-(last + 1) // 64) * 64
    return {"language_model.embed_tokens.weight": rows, "language_model.lm_head.weight": rows}


def hub_files(original: Original, folder: Path) -> dict[str, str]:
    """File name → contents, of the settings that a hub's conversion has and the original `folder` has not."""
    config, tokenizer, images = original.config, original.tokenizer, original.images
    rows = hub_rows(original)["language_model.embed_tokens.weight"]
    family = config["architectures"][0].removesuffix("ForConditionalGeneration")
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    added = tokenizer.backend.get_added_tokens_decoder()
    settings = {key: value for key, value in vars(images).items() if value is not None} | {
        "image_processor_type": f"{family}ImageProcessor",
        "size": images.size.given(),
        "crop_size": images.crop_size and dict(zip(("height", "width"), images.crop_size, strict=True)),
    }
    patches, ratio = ViTConfig.from_hf(config["vision_config"]).grid_side ** 2, config.get("vision_aspect_ratio")
    if images.image_grid_pinpoints:
        del settings["do_pad"]  # there it is about tiles in a batch
    files = {
        "config.json": config | {"text_config": config["text_config"] | {"vocab_size": rows}},
        "preprocessor_config.json": settings,
        "processor_config.json": {
            "processor_class": f"{family}Processor",
            "image_token": IMAGE,
            "patch_size": config["vision_config"].get("patch_size"),
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            **({"num_image_tokens": patches, "vision_aspect_ratio": ratio} if ratio else {}),
        },
        "tokenizer_config.json": read_json(folder / "tokenizer_config.json") | {
            "added_tokens_decoder": {i: {flag: getattr(added[i], flag) for flag in flags} for i in sorted(added)},
        },
    }  # fmt: skip
    return {name: json.dumps(content, indent=2) for name, content in files.items()} | {
        "chat_template.jinja": original.template.source
    }
