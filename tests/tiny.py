"""Tiny random checkpoints: a transformers model as the oracle, and the folder of files that a user downloads.

    opened = tiny.opener(make, KINDS)  # make(folder, kind) gives a Checkpoint
    checkpoint, ours = opened("hub")

`config` is what the hub's config.json of such a model holds, old spellings and gaps included. Every parameter is
random, norms and biases too: what starts at 0 or 1 would hide that it is not used.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers_tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import minivlm

# transformers 5's names in memory → names on disk: (pattern, replacement), applied in this order.
LAYOUTS = {
    "hub": (
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model", "language_model.model"),
        (r"^model\.(\w+_tower)", r"\1.vision_model"),
        (r"^model\.", ""),
    ),
    "4.52": ((r"^(model\.\w+_tower)", r"\1.vision_model"),),
    "v5": (),
    "v5 from a config": (
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model", "language_model.model"),
        (r"^model\.", ""),
    ),
}

TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXTS = {  # by what the hub's file says; num_key_value_heads is left out where the published file leaves it out
    "llama": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **TEXT},
    "llama3": {"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, **TEXT},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None, **TEXT},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6, "max_window_layers": 2, **TEXT},
}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 2, "image_size": 40, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "image_size": 43, "vision_use_head": False}  # 43 = 5 · 8 + 3
TOKENIZERS = {  # by style; all of them know <image>
    "llama": tokenizers_tiny.llama,
    "llama3": lambda: tokenizers_tiny.llama3(added=("<image>",)),
    "qwen2": tokenizers_tiny.qwen2,
}


@dataclass
class Checkpoint:
    folder: Path
    theirs: torch.nn.Module  # float32
    processor: "transformers.ProcessorMixin"  # with its PIL image processor
    layouts: dict = field(default_factory=lambda: LAYOUTS)


def opener(make, kinds):
    """`opened(kind)` → (checkpoint, ours), made once; without a kind, the first."""
    room = TemporaryDirectory()

    @cache
    def opened(kind):
        checkpoint = make(Path(room.name, kind), kind)
        return checkpoint, load(checkpoint.folder)

    return lambda kind=None: opened(kind or next(iter(kinds)))


def make(folder, config, style, template, preprocessor, seed=0):
    """A LLaVA in the hub's layout, with the tokenizer TOKENIZERS[style].

    The preprocessor's numbers and `config["vision_config"]` must be of one size.
    """
    tokenizer = TOKENIZERS[style]()
    config = with_ids(config, tokenizer, "image")
    theirs = build(config, seed)
    # What their processor takes from here, and ours from the model's config.
    vision, strategy = config["vision_config"], "vision_feature_select_strategy"
    class_tokens = int(vision["model_type"] == "clip_vision_model")
    counts = {"patch_size": vision["patch_size"], "num_additional_image_tokens": class_tokens}
    counts[strategy] = config.get(strategy, "default")
    write(folder, config, theirs, preprocessor_config=preprocessor, processor_config=counts)
    tokenizers_tiny.save(tokenizer, folder, style, template)
    return Checkpoint(folder, theirs, transformers.AutoProcessor.from_pretrained(folder, backend="pil"))


def with_ids(config, tokenizer, *names):
    """The config with the ids of the placeholders `names`, and as many words as the tokenizer has, in whole 64s."""
    ids = {f"{name}_token_index": tokenizer.token_to_id(f"<{name}>") for name in names}
    text = config["text_config"] | {"vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64}
    return ids | config | {"text_config": text}


def write(folder, config, theirs, layouts=None, **settings):
    """What the hub has of a model: config.json, the weights in the first of `layouts`, settings as further JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors_of(theirs, "hub", layouts or LAYOUTS), folder)
    for name, content in {"config": config, **settings}.items():
        write_json(folder / f"{name}.json", content)


def load(folder):
    return minivlm.load(folder, device="cpu", dtype="float32")


def build(config, seed=0):
    """The transformers model of a config.json, in float32, with random parameters."""
    config = json.loads(json.dumps(config))  # they write into it
    architecture = getattr(transformers, config["architectures"][0])
    return randomise(architecture(transformers.AutoConfig.for_model(**config)).float().eval(), seed)


@torch.no_grad()
def randomise(model, seed=0):
    """Draws every parameter so that signals keep their size and each parameter is felt in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.copy_(1.3 * x / p[0].numel() ** 0.5)
        else:
            p.copy_(1 + 0.2 * x if name.endswith("weight") else 0.3 * x)  # a norm's; a bias, a newline, a gate
    return model


def tensors_of(theirs, layout="hub", layouts=LAYOUTS):
    """The parameters under the names of `layout`; tied ones once, under their first name."""
    return {rename(name, layout, layouts): p.detach().contiguous() for name, p in theirs.named_parameters()}


def save_tensors(tensors, folder, shards=1):
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: tensors[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def rename(name, layout, layouts=LAYOUTS):
    for pattern, replacement in layouts[layout]:
        name = re.sub(pattern, replacement, name)
    return name


# How a folder may lie on somebody's disk, besides in one file of each layout: in shards, or as transformers 5 writes.
OTHER_FOLDERS = ("hub in 3", "4.52 in 2", "save_pretrained")


def in_layout(checkpoint, layout, folder):
    """The same checkpoint in one of its layouts, or as one of OTHER_FOLDERS."""
    if layout == "save_pretrained":
        checkpoint.theirs.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
        return folder
    variant(checkpoint.folder, folder, drop=["*.safetensors"])
    layout, _, shards = layout.partition(" in ")
    save_tensors(tensors_of(checkpoint.theirs, layout, checkpoint.layouts), folder, int(shards or 1))
    return folder


def copy_settings(source, folder):
    """All but the model, for the processors that do not save themselves here."""
    ignored = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)


def reload(folder):
    """What transformers makes of a folder."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def variant(source, folder, config=None, drop=()):
    """A copy of a checkpoint's folder with changes to config.json (`a.b` reaches into a part), some files left out."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*drop))
    changed = json.loads((source / "config.json").read_text())
    for key, value in (config or {}).items():
        *parts, last = key.split(".")
        place = changed
        for part in parts:
            place = place[part]
        place[last] = value
    write_json(folder / "config.json", changed)
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


# --- conversations ----------------------------------------------------------------------------------------------------


def picture(height, width, seed=0):
    """Noise over a gradient: neighbouring tiles differ, and so do left and right, top and bottom."""
    noise = np.random.default_rng([seed, height, width]).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, height)[:, None, None] * [1, 0, 0.5] + np.linspace(0, 127, width)[:, None] * [0, 1, 0.5]
    return Image.fromarray((noise + slope).astype(np.uint8))


def film(num_frames, height=47, width=91, seed=0):
    return [picture(height, width, seed * 100 + i) for i in range(num_frames)]


def turn(role, *parts):
    """A message; a str is text, a list the frames of a film, all else a picture."""
    kinds = {list: "video", str: "text"}
    parts = [(kinds.get(type(part), "image"), part) for part in parts]
    return {"role": role, "content": [{"type": kind, kind: part} for kind, part in parts]}


def media(conversations, kind):
    """All pictures ("image") or films ("video"), in order."""
    return [part[kind] for c in conversations for m in c for part in m["content"] if part["type"] == kind]


def their_inputs(processor, conversations):
    """What their processor makes of a batch, through the checkpoint's own template."""
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    pictures = media(conversations, "image")
    bos = processor.tokenizer.bos_token
    add_bos = bos is None or not texts[0].startswith(bos)
    return processor(text=texts, images=pictures or None, padding=True, return_tensors="pt", add_special_tokens=add_bos)


class Frames:
    """Stands in for a video processor, which needs torchvision: every frame through an image processor.

    Theirs differs by up to two grey levels of 255, because it does not resize with Pillow: see the fixtures.
    """

    def __init__(self, images, **options):
        self.images, self.options = images, options

    def __call__(self, videos, **_):
        films = [self.images(list(film), return_tensors="np", **self.options)["pixel_values"] for film in videos]
        return {"pixel_values_videos": torch.tensor(np.stack(films))}  # (films, frames, 3, height, width)


# --- comparisons ------------------------------------------------------------------------------------------------------


def close(ours, theirs, atol=1e-4):
    """Whether two tensors have one shape and no number further apart than `atol`; False where one is not finite."""
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= atol).all())


def our_logits(vlm, inputs):
    """Logits of the real tokens, `(number of them, V)`: what stands on padding is nobody's business."""
    with torch.inference_mode():
        return vlm.model(inputs)[inputs.attention_mask > 0]


def whole_and_one_by_one(vlm, conversations, steps):
    """Logits `(B, 1 + steps, V)` where a left-padded batch ends and at random tokens behind it: from one pass over all,
    and from a prefill and a decode step for each token."""
    inputs, whole = vlm.preprocess(conversations), vlm.preprocess(conversations)
    ids = torch.randint(3, 250, (len(conversations), steps), generator=torch.Generator().manual_seed(0))
    whole.input_ids = torch.cat([inputs.input_ids, ids], 1)
    whole.attention_mask = torch.cat([inputs.attention_mask, torch.ones_like(ids)], 1)
    seen = inputs.cross_attention_mask  # Mllama's: an answer sees what the last token of its prompt sees
    whole.cross_attention_mask = None if seen is None else torch.cat([seen, *[seen[:, -1:]] * steps], 1)
    with torch.inference_mode():
        cache = vlm.model.new_cache()
        logits = [vlm.model(inputs, cache, last_only=True)[:, 0]]
        logits += [vlm.model.decode(ids[:, i : i + 1], cache) for i in range(steps)]
        return vlm.model(whole)[:, -steps - 1 :], torch.stack(logits, 1)


def their_logits(theirs, inputs):
    with torch.inference_mode():
        return theirs(**inputs).logits[inputs["attention_mask"] > 0]


def their_embeddings(theirs, inputs):
    """What enters their language model: `(B, T, D)`."""
    seen = []
    module = theirs.model.language_model
    hook = module.register_forward_pre_hook(lambda *args: seen.append(args[2]["inputs_embeds"]), with_kwargs=True)
    their_logits(theirs, inputs)
    hook.remove()
    return seen[0]


def their_answers(theirs, inputs, eos_ids, pad_id, **search):
    """New token ids per row, up to and with the first of `eos_ids`."""
    search = {"do_sample": False, "num_beams": 1} | search
    out = theirs.generate(**inputs, eos_token_id=list(eos_ids) or None, pad_token_id=pad_id, **search)
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]
