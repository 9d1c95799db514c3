"""A model of nine tensors, its files in every layout, and the line that a refused call ends in, for test_weights*."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minivlm.errors import MinivlmError
from minivlm.weights import load_weights

KEYS = {
    "decoder": ("language_model.model", "model.language_model", "model"),
    "decoder.head": ("language_model.lm_head", "lm_head"),
    "tower": ("vision_tower.vision_model", "vision_tower", "model.vision_tower.vision_model", "model.vision_tower"),
    "projector.linear_1": ("multi_modal_projector.linear_1", "model.mm_projector.0"),
    "newline": ("image_newline", "model.image_newline"),
}
OURS = {
    "newline": (3,),
    "decoder.embed.weight": (5, 4),
    "decoder.layers.0.weight": (4, 4),
    "decoder.layers.0.bias": (4,),
    "decoder.layers.1.weight": (4, 4),
    "decoder.layers.1.bias": (4,),
    "decoder.head.weight": (5, 4),
    "tower.patch.weight": (3, 2),
    "projector.linear_1.weight": (4, 3),
}
LAYOUTS = {  # the names that the files of each kind hold, in the order of OURS
    "hub": ("image_newline", "language_model.model.embed.weight", "language_model.model.layers.0.weight",
            "language_model.model.layers.0.bias", "language_model.model.layers.1.weight",
            "language_model.model.layers.1.bias", "language_model.lm_head.weight",
            "vision_tower.vision_model.patch.weight", "multi_modal_projector.linear_1.weight"),
    "4.52": ("model.image_newline", "model.language_model.embed.weight", "model.language_model.layers.0.weight",
             "model.language_model.layers.0.bias", "model.language_model.layers.1.weight",
             "model.language_model.layers.1.bias", "lm_head.weight", "model.vision_tower.vision_model.patch.weight",
             "multi_modal_projector.linear_1.weight"),
    "v5": ("model.image_newline", "model.language_model.embed.weight", "model.language_model.layers.0.weight",
           "model.language_model.layers.0.bias", "model.language_model.layers.1.weight",
           "model.language_model.layers.1.bias", "lm_head.weight", "model.vision_tower.patch.weight",
           "multi_modal_projector.linear_1.weight"),
    "original": ("model.image_newline", "model.embed.weight", "model.layers.0.weight", "model.layers.0.bias",
                 "model.layers.1.weight", "model.layers.1.bias", "lm_head.weight",
                 "vision_tower.patch.weight", "model.mm_projector.0.weight"),
}  # fmt: skip
HUB = dict(zip(OURS, LAYOUTS["hub"], strict=True))


class Packing(nn.Linear):
    """Notes, when packed, which weights of the whole model have arrived."""

    def __init__(self, width, journal):
        super().__init__(width, width)
        self.journal = journal

    def pack(self):
        self.journal.append([name for name, tensor in self.journal.model.named_parameters() if not tensor.is_meta])


class Journal(list):
    model = None


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.journal = Journal()
        self.newline = nn.Parameter(torch.empty(3))
        self.decoder = nn.Module()
        self.decoder.embed = nn.Embedding(5, 4)
        self.decoder.layers = nn.ModuleList([Packing(4, self.journal) for _ in range(2)])
        self.decoder.head = nn.Linear(4, 5, bias=False)
        self.tower = nn.Module()
        self.tower.patch = nn.Linear(2, 3, bias=False)
        self.projector = nn.Module()
        self.projector.linear_1 = nn.Linear(3, 4, bias=False)
        self.journal.model = self


def empty():
    with torch.device("meta"):
        return Tiny()


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in OURS.items()}


def write(folder, layout="hub", dtype=torch.float32, changes=None):
    """A single safetensors file of `layout`; `changes`: name on disk → tensor, or None to leave it out."""
    disk = dict(zip(LAYOUTS[layout], tensors(dtype).values(), strict=True)) | (changes or {})
    save_file({name: tensor for name, tensor in disk.items() if tensor is not None}, folder / "model.safetensors")


def write_shards(folder, kind="safetensors"):
    disk = dict(zip(LAYOUTS["hub"], tensors().values(), strict=True))
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    names = list(disk)
    parts = {f"{stem}-0000{i + 1}-of-00003.{kind}": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save({name: disk[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return list(parts)


def check_equal(model, theirs):
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def refusal(call, *arguments, **keywords):
    """The one line that the call is refused with."""
    with pytest.raises(MinivlmError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1200
    return text


def load(folder, **keywords):
    model = empty()
    keywords = {"dtype": torch.float32} | keywords
    return model, load_weights(model, folder, KEYS, **keywords)
