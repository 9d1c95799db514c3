"""A folder of tensors → a model that was built on the meta device: renamed, strictly checked, memory-mapped; and back.

A checkpoint's names differ by the year and by the tool that wrote it. Each model's file therefore holds one table,

    KEYS = {"decoder": ("language_model.model", "model.language_model", "model"),     # ours: the spellings on disk
            "lm_head": ("language_model.lm_head", "lm_head"), ...}

of prefixes that end where a name has a dot (the dot is not written), or of whole names ("image_newline"). The longest
spelling that fits a name on disk wins. The first of each tuple is what the hub publishes and `save_weights` writes.

Nothing is read before it is needed. A safetensors file is mapped into memory and a parameter is a view of that map: its
bytes come from the disk when the model first uses them, and take no memory. What must change (dtype, device, packing)
changes module by module, and the pages behind it are handed back at once: the peak is one converted copy plus a layer.

Does not: download (`hub.py`), build models, know any model's name, or read quantised weights.
"""

import json
import math
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from minivlm.errors import MinivlmError
from minivlm.files import one_line, read_json

Keys = Mapping[str, tuple[str, ...]]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {                                 # by the names in files; all but FLOATS are tables or quantised
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
STALE = (".rotary_emb.inv_freq", ".position_ids")   # tables that old releases stored; computed here
SHARD_BYTES = 5_000_000_000                         # largest file save_weights writes, as transformers' default was
PROGRESS_BYTES = 1_000_000_000                      # checkpoints from this size on show a progress bar
SAVED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
UNQUANTISED = "use the checkpoint that it was quantised from"
QUANTISED = re.compile(r"-(AWQ|GPTQ(-Int[48])?)/?$", re.IGNORECASE)   # how the names of such repositories end
NAMED = 5                                           # offending tensors an error spells out before it only counts


# ---- config.json -----------------------------------------------------------------------------------------------------


def read_config(folder: Path | str, name: str = "") -> dict:
    """The folder's config.json, which must be that of an unquantised checkpoint in the hub's format.

    `name`: what the caller knows the folder by (a hub id), for the error that names a quantised one's twin.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MinivlmError(f"{folder} is not a folder: give a checkpoint's folder, a hub id, or an alias (see --list)")
    if not (folder / "config.json").is_file():
        raise MinivlmError(f"{folder} has no config.json: give a folder laid out as on the hub")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise MinivlmError(f"{folder / 'config.json'} names no model_type: give a folder laid out as on the hub")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
        twin = _unquantised(config, name or str(folder))
        instead = f"{UNQUANTISED}, {twin}" if twin else UNQUANTISED
        kind = _some([str(method)])
        raise MinivlmError(f"{name or folder} holds {kind} weights, which minivlm cannot read: {instead}")
    return config


def _unquantised(config: dict, name: str) -> str | None:
    """What a quantised checkpoint was made from, if its config or its name tells."""
    source = str(config.get("_name_or_path", ""))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not QUANTISED.search(source):
        return source
    return QUANTISED.sub("", name) if QUANTISED.search(name) else None


# ---- what lies on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: where, and what its header says. `tensor()` maps it, `forget()` hands its pages back."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: "mmap.mmap | torch.Tensor"     # the whole file mapped; or, from a .bin, the tensor that torch.load mapped
    start: int = 0                         # byte offset into the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """A view of the file: copy-on-write, so that training in place never changes the file."""
        if isinstance(self.source, torch.Tensor):
            return self.source
        count = math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(self.source, dtype=self.dtype, count=count, offset=self.start).view(self.shape)

    def forget(self) -> None:
        """Hand back the pages that this tensor alone fills; a later use reads them again (what was written is lost)."""
        if isinstance(self.source, torch.Tensor) or not hasattr(mmap, "MADV_DONTNEED"):   # Windows has no madvise
            return
        first = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self.start + self.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self.source.madvise(mmap.MADV_DONTNEED, first, last - first)


def read_headers(folder: Path | str) -> dict[str, Stored]:
    """Every tensor's name on disk → where it lies, from headers alone. Raises on what is absent, damaged, quantised."""
    folder = Path(folder)
    for name, read_shard in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_shard(folder / name)
        if index.is_file():
            return _read_shards(index, read_shard)
    raise MinivlmError(f"{folder} has no weights (model.safetensors, pytorch_model.bin or shards): download it again")


def _read_shards(index: Path, read_shard: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    # a shard is a plain file name: an index from the network must not reach out of its folder
    if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) and Path(f).name == f and f.isprintable() and len(f) < 256 for f in weight_map.values()):
        raise MinivlmError(f"{index} is damaged (no weight_map from tensors to files): download it again")
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).is_file():
            raise MinivlmError(f"{index} names {file}, which is not in the folder: download that shard")
        shard = read_shard(index.parent / file)
        found.update((tensor, stored) for tensor, stored in shard.items() if weight_map.get(tensor, file) == file)
    lost = [tensor for tensor in weight_map if tensor not in found]
    if lost:
        raise MinivlmError(f"{index} names tensors that their shards do not hold ({_some(lost)}): download it again")
    return found


def stored_dtype(folder: Path | str) -> torch.dtype:
    """The dtype of most bytes in the checkpoint, which config.json does not always tell: where dtype="auto" starts."""
    sizes: dict[torch.dtype, int] = {}
    for stored in read_headers(folder).values():
        if stored.dtype in FLOATS.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _read_safetensors(file: Path) -> dict[str, Stored]:
    """The file: 8 bytes, little-endian, the header's length; the header, {name: {dtype, shape, data_offsets}}; data."""
    try:
        with open(file, "rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        body = 8 + int.from_bytes(data[:8], "little")
        if body > len(data):
            raise ValueError(f"its header ends at byte {body} of {len(data)}")
        header = json.loads(data[8:body])
        header.pop("__metadata__", None)
        return {name: _parse_entry(file, name, entry, data, body) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MinivlmError(f"{file} is damaged or incomplete ({one_line(error)}): download it again") from error


def _parse_entry(file: Path, name: str, entry: dict, data: mmap.mmap, body: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise MinivlmError(f"{file}: {_some([name])} is stored as {_some([entry['dtype']])}: {UNQUANTISED}")
    start, end = entry["data_offsets"]
    stored = Stored(file, tuple(entry["shape"]), DTYPES[entry["dtype"]], data, body + start)
    numbers = (start, end, *stored.shape)
    if any(type(n) is not int or n < 0 for n in numbers) or stored.num_bytes != end - start:
        raise ValueError(f"{name} of shape {list(stored.shape)} cannot lie at bytes {start} to {end}")
    if body + end > len(data):
        raise ValueError(f"{name} ends at byte {body + end} of {len(data)}")
    return stored


def _read_bin(file: Path) -> dict[str, Stored]:
    """A pickle, read by torch's restricted unpickler: tensors only, a file that asks to run code is an error."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:    # pickle's documentation: a damaged file may raise anything
        raise MinivlmError(f"{file} is damaged or holds code ({one_line(error)}): download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                                                for name, tensor in tensors.items()):
        raise MinivlmError(f"{file} is not a table of tensors: minivlm reads checkpoints as transformers saves them")
    return {name: Stored(file, tuple(tensor.shape), tensor.dtype, tensor.detach()) for name, tensor in tensors.items()}


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `load_weights` did."""

    tensors: int
    num_bytes: int                     # on disk
    dtypes: tuple[torch.dtype, ...]    # on disk
    layout: str                        # "hub": every name had the published spelling; else "other"
    seconds: float


def load_weights(model: nn.Module, folder: Path | str, keys: Keys, dtype: torch.dtype,
                 device: torch.device | str = "cpu", skip: Iterable[str] = (), pack: bool = True) -> Report:
    """Fill `model`, which was built under `torch.device("meta")`, with the folder's tensors as `dtype` on `device`.

    `skip`: prefixes or `*` patterns of our names (on disk, where `keys` gives a tensor none) that are neither loaded
    nor missed, such as a tied head or a tower that is not wanted; their bytes are never read. `pack`: on a CPU in
    bfloat16, a module that has a `pack()` method is packed as soon as its tensors are there. A module with an attribute
    `cuts_rows` takes the first rows of a longer table. Raises with the names of what is missing, unexpected or
    misshapen.
    """
    begun = time.perf_counter()
    folder, device, skip = Path(folder), torch.device(device), tuple(skip)
    wanted = {name: old for name, old in model.state_dict(keep_vars=True).items() if not _matches(name, skip)}
    cut = {f"{prefix}.weight" for prefix, module in model.named_modules() if hasattr(module, "cuts_rows")}
    found, spelled = _find(folder, keys, wanted, skip, cut)

    total = sum(stored.num_bytes for stored in found.values())
    pack = pack and device.type == "cpu" and dtype == torch.bfloat16
    small = True if total < PROGRESS_BYTES else None       # None: shown on a terminal only
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=small) as bar:
        owned: dict[str, list[str]] = {}
        for name in wanted:
            owned.setdefault(name.rpartition(".")[0], []).append(name)
        for prefix, module in model.named_modules():
            mine = [(name, found[name]) for name in owned.get(prefix, ())]
            for name, stored in mine:
                # first to the device, then to the dtype: a GPU converts faster than a CPU
                old = wanted[name]
                tensor = (stored.tensor()[: len(old)] if name in cut else stored.tensor()).to(device).to(dtype)
                if isinstance(old, nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
                setattr(module, name.rpartition(".")[2], tensor)
                bar.update(stored.num_bytes)
            packs = pack and hasattr(module, "pack")
            if packs:
                module.pack()
            for _, stored in mine:
                if packs or device.type != "cpu" or stored.dtype != dtype:      # else the parameter is the map itself
                    stored.forget()
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta and not _matches(name, skip)]
    assert not left, f"on the meta device and in no checkpoint: {left}; compute such buffers when they are first used"
    layout = "hub" if all(spelled[name] == _published(name, keys) for name in found) else "other"
    dtypes = tuple({stored.dtype for stored in found.values()})
    return Report(len(found), total, dtypes, layout, time.perf_counter() - begun)


def _find(folder: Path, keys: Keys, wanted: Mapping[str, torch.Tensor],
          skip: tuple[str, ...], cut: set[str]) -> tuple[dict[str, Stored], dict[str, str]]:
    """Our names → tensors on disk, and → their names there. All that does not fit is collected into one error."""
    found, spelled, faults = {}, {}, {"unexpected": [], "missing": [], "misshapen": []}
    spellings = sorted(((spelling, ours) for ours, tuple_ in keys.items() for spelling in tuple_),
                       key=lambda pair: -len(pair[0]))
    for name, stored in read_headers(folder).items():
        ours = next((_swap(name, spelling, ours) for spelling, ours in spellings if _starts(name, spelling)), None)
        if name.endswith(STALE) or _matches(name if ours is None else ours, skip):
            continue
        if stored.dtype not in FLOATS.values():
            raise MinivlmError(f"{stored.file}: {_some([name])} is stored as {stored.dtype}: {UNQUANTISED}")
        if ours not in wanted:
            faults["unexpected"].append(name)
        elif ours in found:
            faults["unexpected"].append(f"{name} beside {spelled[ours]}")
        else:
            found[ours], spelled[ours] = stored, name
    for ours, old in wanted.items():
        if ours not in found:
            faults["missing"].append(_published(ours, keys))
        elif not _fits(found[ours].shape, old.shape, ours in cut):
            faults["misshapen"].append(f"{spelled[ours]} {list(found[ours].shape)}, not {list(old.shape)}")
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise MinivlmError(f"the weights in {folder} do not fit its config.json ({told}): are both of one download?")
    return found, spelled


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], may_be_longer: bool) -> bool:
    return shape == wanted or may_be_longer and shape[1:] == wanted[1:] and shape[:1] > wanted[:1]


def _all_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, folder: Path | str, keys: Keys, shard_bytes: int = SHARD_BYTES,
                 rows: Mapping[str, int] | None = None) -> None:
    """Write the model in the hub's spelling: model.safetensors, or shards of at most `shard_bytes` and their index.

    Files are written under other names and renamed at the end: a save that is killed leaves the old checkpoint whole,
    and a model whose weights are views of the files it overwrites keeps them. `rows`: our names of tables that get
    more rows on disk, to this number.
    """
    folder = Path(folder)
    shards: list[dict[str, int]] = []                      # per file: published name → bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in _shards(model, keys, shard_bytes, rows or {}):
            save_file(shard, folder / f"model-{len(shards)}.part", metadata={"format": "pt"})
            shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        count = len(shards)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count > 1:
            index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
                     "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
            (folder / f"model-{count}.part").write_text(json.dumps(index, indent=2) + "\n")
            files.append("model.safetensors.index.json")
        else:
            files = ["model.safetensors"]
        for i, file in enumerate(files):
            os.replace(folder / f"model-{i}.part", folder / file)
        for old in folder.iterdir():                       # what an earlier save with another number of shards left
            if old.name not in files and SAVED.fullmatch(old.name):
                old.unlink()
    except (OSError, SafetensorError) as error:
        raise MinivlmError(f"could not save to {folder} ({one_line(error)}): is there room on the disk?") from error
    finally:
        for part in folder.glob("model-*.part"):
            part.unlink()


def _shards(model: nn.Module, keys: Keys, shard_bytes: int,
            rows: Mapping[str, int]) -> Iterable[dict[str, torch.Tensor]]:
    """The model's tensors under their published names, in parts of at most `shard_bytes` (or of one larger tensor)."""
    shard, num_bytes = {}, 0
    for prefix, module in model.named_modules():
        tensors: dict[str, torch.Tensor] = {}              # not model.state_dict(): it would unpack everything at once
        module._save_to_state_dict(tensors, f"{prefix}." if prefix else "", keep_vars=False)
        for ours, tensor in tensors.items():
            if len(tensor.shape) == 2 and len(tensor) < rows.get(ours, 0):   # by their mean, never the likeliest word
                mean = tensor.float().mean(0).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(rows[ours] - len(tensor), -1)])
            if shard and num_bytes + tensor.nbytes > shard_bytes:
                yield shard
                shard, num_bytes = {}, 0
            shard[_published(ours, keys)] = tensor.cpu().contiguous()
            num_bytes += tensor.nbytes
    yield shard


# ---- names -----------------------------------------------------------------------------------------------------------


def _starts(name: str, prefix: str) -> bool:
    """Whether `prefix` is the whole name or ends at one of its dots: "model" fits "model.norm", not "models.norm"."""
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _swap(name: str, old: str, new: str) -> str:
    """`name` with its prefix `old` replaced; either may be empty."""
    rest = name[len(old):].lstrip(".")
    return f"{new}.{rest}" if new and rest else new or rest


def _published(ours: str, keys: Keys) -> str:
    """Our name → the hub's."""
    prefix = max((prefix for prefix in keys if _starts(ours, prefix)), key=len)
    return _swap(ours, prefix, keys[prefix][0])


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(_starts(name, pattern) or fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(" ".join(name.split())[:200] for name in names[:NAMED]) + more
