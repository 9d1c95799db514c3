"""Whatever is wrong with a checkpoint's files is named in one line, and nothing in them is ever run."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_weights import load, refusal, write, write_shards

from minivlm.errors import MinivlmError
from minivlm.weights import read_config

# ---- strictness ------------------------------------------------------------------------------------------------------


def test_error_names_missing(tmp_path):
    write(tmp_path, changes={"image_newline": None, "language_model.lm_head.weight": None})
    assert "2 missing: image_newline, language_model.lm_head.weight" in refusal(load, tmp_path)


def test_error_names_unexpected(tmp_path):
    write(tmp_path, changes={"text.extra": torch.ones(1), "vision_tower.vision_model.more": torch.ones(1)})
    assert "2 unexpected: text.extra, vision_tower.vision_model.more" in refusal(load, tmp_path)


def test_error_names_both_shapes(tmp_path):
    write(tmp_path, changes={"language_model.lm_head.weight": torch.ones(6, 4)})
    assert "1 misshapen: language_model.lm_head.weight [6, 4], not [5, 4]" in refusal(load, tmp_path)


def test_error_names_renamed_twice(tmp_path):
    write(tmp_path, changes={"image_newline": None, "image_new_line": torch.ones(3)})
    text = refusal(load, tmp_path)
    assert "1 unexpected: image_new_line" in text and "1 missing: image_newline" in text


def test_error_names_a_tensor_in_two_spellings(tmp_path):
    write(tmp_path, changes={"model.image_newline": torch.ones(3)})
    text = refusal(load, tmp_path)
    assert "image_newline" in text and "model.image_newline" in text


def test_error_counts_beyond_five(tmp_path):
    write(tmp_path, changes={f"extra.{i}\nline": torch.ones(1) for i in range(40)})
    text = refusal(load, tmp_path)
    assert "40 unexpected" in text and "and 35 more" in text and text.count("extra.") == 5


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_error_no_weights(tmp_path):
    assert "no weights" in refusal(load, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_error_truncated_file(tmp_path, keep):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    text = refusal(load, tmp_path)
    assert "model.safetensors is damaged or incomplete" in text and "download it again" in text


@pytest.mark.parametrize("header", [
    b"[]", b"{}}", b"\xff" * 30, b"[" * 9999, b'{"a": 1}', b'{"a": {"dtype": "F32"}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
])  # fmt: skip
def test_error_corrupt_header(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert "model.safetensors is damaged" in refusal(load, tmp_path)


def test_error_missing_shard(tmp_path):
    lost = write_shards(tmp_path)[1]
    (tmp_path / lost).unlink()
    assert f"names {lost}, which is not in the folder" in refusal(load, tmp_path)


def test_error_index_names_a_tensor_nobody_holds(tmp_path):
    file = write_shards(tmp_path)[0]
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["phantom"] = file
    index.write_text(json.dumps(content))
    assert "phantom" in refusal(load, tmp_path)


@pytest.mark.parametrize("content", [
    "", "[]", "{", "{}", "[" * 99999, '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}',
    '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "/etc/hosts"}}',
    '{"weight_map": {"a": "x\\u0000y"}}', json.dumps({"weight_map": {"a": "x" * 5000}}),
])  # fmt: skip
def test_error_corrupt_index(tmp_path, content):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(load, tmp_path)[:500]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_error_quantised_tensor(tmp_path, dtype, kind):
    value = {"a.qweight": torch.zeros(4).to(dtype)}
    if kind == "bin":
        torch.save(value, tmp_path / "pytorch_model.bin")
    else:
        save_file(value, tmp_path / "model.safetensors")
    text = refusal(load, tmp_path)
    assert "a.qweight is stored as" in text and "quantised" in text


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_bin_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Attack()}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is damaged or holds code" in refusal(load, tmp_path)
    assert not Path("owned").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.ones(1)}}, [torch.ones(1)], {3: torch.ones(1)}])
def test_error_bin_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "not a table of tensors" in refusal(load, tmp_path)


def test_error_truncated_bin(tmp_path):
    file = tmp_path / write_shards(tmp_path, "bin")[2]
    file.write_bytes(file.read_bytes()[:-50])
    assert f"{file.name} is damaged" in refusal(load, tmp_path)


@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    st.sampled_from(["safetensors", "bin"]),
    st.sampled_from(["shard", "index", "config"]),
)
def test_mutated_files_load_or_are_refused(mutations, kind, what):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard = write_shards(folder, kind)[0]
        (folder / "config.json").write_text('{"model_type": "llava", "quantization_config": null, "x": [1, 2.5, "é"]}')
        index = shard.partition("-")[0] + f".{kind}.index.json"
        file = folder / {"shard": shard, "index": index, "config": "config.json"}[what]
        data = bytearray(file.read_bytes())
        for position, byte in mutations:
            data[int(position * len(data))] = byte
        file.write_bytes(data)
        try:
            read_config(folder)
            load(folder)
        except MinivlmError as error:
            assert "\n" not in str(error)


# ---- config.json -----------------------------------------------------------------------------------------------------


def test_read_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "quantization_config": null}')
    assert read_config(tmp_path)["model_type"] == "llava"


@pytest.mark.parametrize(("content", "told"), [
    ("", "damaged"), ("{", "damaged"), ("[1]", "damaged"), ("\x00", "damaged"), ("[" * 99999, "damaged"),
    ('{"model_type": 3}', "model_type"), ('{"hello": "world"}', "model_type"),
    ('{"model_type": "llava", "quantization_config": {"quant_method": "awq", "bits": 4}}', "awq"),
    ('{"model_type": "llava", "quantization_config": {"quant_method": "gptq"}}', "gptq"),
    ('{"model_type": "llava", "quantization_config": {"load_in_4bit": true}}', "quantised"),
])  # fmt: skip
def test_read_config_errors(tmp_path, content, told):
    (tmp_path / "config.json").write_text(content)
    assert told in refusal(read_config, tmp_path)


@pytest.mark.parametrize(("name", "config", "twin"), [
    ("Qwen/Qwen2-VL-7B-Instruct-AWQ", {}, "Qwen/Qwen2-VL-7B-Instruct"),
    ("Qwen/Qwen2-VL-2B-Instruct-GPTQ-Int4", {}, "Qwen/Qwen2-VL-2B-Instruct"),
    ("Qwen/Qwen2-VL-2B-Instruct-GPTQ-Int8", {"_name_or_path": "/mnt/models/x"}, "Qwen/Qwen2-VL-2B-Instruct"),
    ("my-qwen-awq/", {"_name_or_path": "Qwen/Qwen2-VL-7B-Instruct-AWQ"}, "my-qwen"),
    ("somebody/small", {"_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}, "Qwen/Qwen2-VL-7B-Instruct"),
    ("somebody/small", {}, None),
])  # fmt: skip
def test_quantised_checkpoint_names_its_twin(tmp_path, name, config, twin):
    config |= {"model_type": "qwen2_vl", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = refusal(read_config, tmp_path, name)
    assert name in told
    assert told.endswith(f"quantised from, {twin}" if twin else "quantised from")


def test_read_config_of_no_checkpoint(tmp_path):
    assert "not a folder" in refusal(read_config, tmp_path / "nowhere")
    assert "no config.json" in refusal(read_config, tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "damaged" in refusal(read_config, tmp_path)
