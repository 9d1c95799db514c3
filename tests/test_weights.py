"""Every spelling loads and is saved as the hub has it, and no memory is taken that need not be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_weights import HUB, KEYS, LAYOUTS, OURS, check_equal, empty, load, refusal, tensors, write, write_shards
from torch import nn

from minivlm import weights
from minivlm.layers import Linear
from minivlm.weights import Stored, load_weights, read_headers, save_weights, stored_dtype

# ---- layouts and containers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_every_layout(tmp_path, layout):
    write(tmp_path, layout)
    model, report = load(tmp_path)
    check_equal(model, tensors())
    assert report.tensors == len(OURS) and report.dtypes == (torch.float32,)
    assert report.num_bytes == 4 * sum(tensor.numel() for tensor in tensors().values())
    assert report.layout == ("hub" if layout == "hub" else "other")


def test_load_longest_spelling_wins_whatever_the_order(tmp_path):
    write(tmp_path, "v5")
    model = empty()
    load_weights(model, tmp_path, dict(reversed(KEYS.items())), torch.float32)
    check_equal(model, tensors())


def test_load_without_the_longer_spelling_fails(tmp_path):
    """The twin: "model" alone would swallow "model.language_model"."""
    write(tmp_path, "v5")
    shorter = KEYS | {"decoder": ("language_model.model", "model")}
    text = refusal(load_weights, empty(), tmp_path, shorter, torch.float32)
    assert "model.language_model.layers.0.weight" in text


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_load_shards(tmp_path, kind):
    write_shards(tmp_path, kind)
    model, _ = load(tmp_path)
    check_equal(model, tensors())


def test_load_single_bin(tmp_path):
    torch.save(dict(zip(LAYOUTS["original"], tensors().values(), strict=True)), tmp_path / "pytorch_model.bin")
    model, _ = load(tmp_path)
    check_equal(model, tensors())


def test_load_prefers_safetensors(tmp_path):
    write(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    check_equal(load(tmp_path)[0], tensors())


def test_load_submodule_with_empty_prefix(tmp_path):
    clip = {"vision_model.weight": torch.ones(2, 2), "text_model.weight": torch.ones(1)}
    save_file(clip, tmp_path / "model.safetensors")
    with torch.device("meta"):
        tower = nn.Linear(2, 2, bias=False)
    load_weights(tower, tmp_path, {"": ("vision_model",)}, torch.float32, skip=["text_model"])
    assert torch.equal(tower.weight, torch.ones(2, 2))


def test_load_tensors_at_odd_offsets(tmp_path):
    """Old writers did not pad the header, so a float may begin at any byte."""
    write(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    check_equal(load(tmp_path)[0], tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_converts_dtype(tmp_path, dtype):
    write(tmp_path, dtype=dtype)
    model, report = load(tmp_path)
    assert stored_dtype(tmp_path) == dtype and report.dtypes == (dtype,)
    check_equal(model, {name: tensor.to(dtype).float() for name, tensor in tensors().items()})


def test_stored_dtype_goes_by_bytes(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(100).half()}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.float16


def test_load_keeps_buffers_and_requires_grad(tmp_path):
    save_file({"scale": torch.ones(2), "weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.BatchNorm1d(2, track_running_stats=False)
        model.register_buffer("scale", torch.empty(2))
        model.bias = None
    model.weight.requires_grad = False
    load_weights(model, tmp_path, {"": ("",)}, torch.float32)
    assert not model.weight.requires_grad and isinstance(model.weight, nn.Parameter)
    assert list(dict(model.named_buffers())) == ["scale"]


def test_load_refuses_to_leave_a_meta_tensor(tmp_path):
    write(tmp_path)
    model = empty()
    model.register_buffer("inv_freq", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(AssertionError, match="inv_freq"):
        load_weights(model, tmp_path, KEYS, torch.float32)


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_load_ignores_stale_tables(tmp_path):
    stale = ("language_model.model.layers.0.rotary_emb.inv_freq", "vision_tower.vision_model.position_ids")
    write(tmp_path, changes={stale[0]: torch.ones(2), stale[1]: torch.arange(5)})      # int64, and yet not quantised
    check_equal(load(tmp_path)[0], tensors())
    assert stored_dtype(tmp_path) == torch.float32


@pytest.mark.parametrize("skip", ["tower", "tower.patch.weight", "tower.*", "*.patch.weight"])
def test_skip_never_reads(tmp_path, monkeypatch, skip):
    write(tmp_path)
    read = []
    tensor = Stored.tensor
    monkeypatch.setattr(Stored, "tensor", lambda self: read.append(self.start) or tensor(self))
    tower = read_headers(tmp_path)["vision_tower.vision_model.patch.weight"].start
    model, report = load(tmp_path, skip=[skip])
    assert tower not in read and len(read) == report.tensors == len(OURS) - 1
    assert model.tower.patch.weight.is_meta
    load(tmp_path)
    assert tower in read


def test_skip_of_what_the_model_lacks(tmp_path):
    write(tmp_path)
    model = empty()
    del model.tower
    assert "vision_tower.vision_model.patch.weight" in refusal(load_weights, model, tmp_path, KEYS, torch.float32)
    load_weights(model, tmp_path, KEYS, torch.float32, skip=["tower"])


def test_skip_names_what_has_no_name_of_ours(tmp_path):
    write(tmp_path, changes={"logit_scale": torch.ones(1)})
    assert "1 unexpected: logit_scale" in refusal(load, tmp_path)
    check_equal(load(tmp_path, skip=["logit_scale", "vision_tower"])[0], tensors())    # ours is "tower"


def test_skip_ends_at_a_dot(tmp_path):
    write(tmp_path)
    model, _ = load(tmp_path, skip=["tow"])
    check_equal(model, tensors())


# ---- packing and memory ----------------------------------------------------------------------------------------------


def test_pack_follows_each_layer(tmp_path):
    """When a layer is packed its own weights are there and the next layer's are not: never two copies of everything."""
    write(tmp_path)
    model, _ = load(tmp_path, dtype=torch.bfloat16)
    first, second = model.journal
    assert "decoder.layers.0.weight" in first and "decoder.layers.0.bias" in first
    assert "decoder.layers.1.weight" not in first and "decoder.layers.1.weight" in second


@pytest.mark.parametrize("keywords", [{"pack": False, "dtype": torch.bfloat16}, {"dtype": torch.float32}])
def test_pack_only_where_asked(tmp_path, keywords):
    write(tmp_path)
    assert not load(tmp_path, **keywords)[0].journal


def test_training_in_place_leaves_the_file(tmp_path):
    write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model, _ = load(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    check_equal(model, {name: tensor + 1 for name, tensor in tensors().items()})


MEMORY = """
import sys, torch
from torch import nn
from minivlm.weights import load_weights
def megabytes(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(2560, 2560, bias=False) for _ in range(16)))
torch.ones(1).bfloat16().float()
anonymous, peak = megabytes("RssAnon"), megabytes("VmHWM")
load_weights(model, sys.argv[1], {"": ("",)}, getattr(torch, sys.argv[2]))
print(megabytes("RssAnon") - anonymous, megabytes("VmHWM") - peak, float(model[7].weight[0, 0]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MiB of bfloat16 in 16 layers."""
    folder = tmp_path_factory.mktemp("large")
    weight = torch.full((2560, 2560), 0.5, dtype=torch.bfloat16)
    save_file({f"{i}.weight": weight.clone() for i in range(16)}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize(("dtype", "copy"), [("bfloat16", 0), ("float32", 400)])
def test_memory_is_one_copy_and_one_layer(large, dtype, copy):
    """Nothing where nothing changes; else one copy, beside which not even the file's own pages stay."""
    done = subprocess.run([sys.executable, "-c", MEMORY, large, dtype], capture_output=True, text=True, check=True)
    anonymous, peak, value = map(float, done.stdout.split())
    assert value == 0.5
    assert copy - 20 < anonymous < copy + 20
    assert peak < copy + 60


# ---- saving ----------------------------------------------------------------------------------------------------------


def loaded(tmp_path):
    write(tmp_path, "v5")
    return load(tmp_path)[0]


def test_save_writes_the_hubs_names(tmp_path):
    save_weights(loaded(tmp_path), tmp_path / "out", KEYS)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == set(HUB.values())
    for ours, name in HUB.items():
        assert torch.equal(tensors()[ours], theirs[name])
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[:200]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_save_round_trips(tmp_path):
    save_weights(loaded(tmp_path), tmp_path, KEYS)      # over the very file that the weights are views of
    model, report = load(tmp_path)
    check_equal(model, tensors())
    assert report.layout == "hub"


def test_save_shards(tmp_path):
    model, out = loaded(tmp_path), tmp_path / "out"
    save_weights(model, out, KEYS, shard_bytes=200)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in out.glob("*.safetensors")) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in tensors().values())
    for file in files:
        shard = load_file(out / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 200
        assert all(index["weight_map"][name] == file for name in shard)
    check_equal(load(out)[0], tensors())

    (out / "model-of-mine.safetensors").touch()
    save_weights(model, out, KEYS)                      # one file again, and no shards of old beside it
    assert sorted(os.listdir(out)) == ["model-of-mine.safetensors", "model.safetensors"]


def test_save_that_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model, out = loaded(tmp_path), tmp_path / "out"
    save_weights(model, out, KEYS)
    before = (out / "model.safetensors").read_bytes()
    calls = []

    def full(shard, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise OSError("No space left on device")
        return save_file(shard, file, metadata)

    monkeypatch.setattr(weights, "save_file", full)
    text = refusal(save_weights, model, out, KEYS, shard_bytes=200)
    assert "No space left on device" in text and "is there room" in text
    assert os.listdir(out) == ["model.safetensors"] and (out / "model.safetensors").read_bytes() == before


def test_save_of_packed_layers(tmp_path):
    model = nn.Sequential(Linear(8, 8), Linear(8, 8, bias=False)).bfloat16()
    theirs = {name: tensor.normal_().clone() for name, tensor in model.state_dict().items()}
    for layer in model:
        layer.pack()
    save_weights(model, tmp_path, {"": ("model",)})
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == {f"model.{name}" for name in theirs}
    assert all(torch.equal(ours[f"model.{name}"], tensor) for name, tensor in theirs.items())
