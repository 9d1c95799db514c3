"""A name → a folder on disk. Folders are themselves; aliases and hub ids are downloaded once, by huggingface_hub.

All its environment variables hold: HF_HOME (where its cache is), HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HF_TOKEN.
It shows progress, takes up a broken connection where it broke, and fetches no finished file twice.

Does not: look into config.json (what a checkpoint is stands there, never in its name), or read weights (`weights.py`).
"""

import errno
import json
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from minivlm.errors import MinivlmError
from minivlm.files import read_json

ALIASES = {  # alias → hub id
    "llava-v1.5": "llava-hf/llava-1.5-7b-hf",
    "llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-v1.6": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-v1.6-34b": "llava-hf/llava-v1.6-34b-hf",
    "llava-next-llama3-8b": "llava-hf/llama3-llava-next-8b-hf",
    "llava-next-72b": "llava-hf/llava-next-72b-hf",
    "video-llava": "LanguageBind/Video-LLaVA-7B-hf",
    "llava-onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava-onevision-72b": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    "qwen2-vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2-vl-72b": "Qwen/Qwen2-VL-72B-Instruct",
    "llama-3.2-11b-vision": "meta-llama/Llama-3.2-11B-Vision",
    "llama-3.2-11b-vision-instruct": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama-3.2-90b-vision": "meta-llama/Llama-3.2-90B-Vision",
    "llama-3.2-90b-vision-instruct": "meta-llama/Llama-3.2-90B-Vision-Instruct",
}
GIGABYTES = {  # 1e9 bytes to download: two for each parameter, counted from the published sizes
    "llava-hf/llava-1.5-7b-hf": 14.1,
    "llava-hf/llava-1.5-13b-hf": 26.7,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 14.1,
    "llava-hf/llava-v1.6-vicuna-13b-hf": 26.7,
    "llava-hf/llava-v1.6-mistral-7b-hf": 15.1,
    "llava-hf/llava-v1.6-34b-hf": 69.5,
    "llava-hf/llama3-llava-next-8b-hf": 16.7,
    "llava-hf/llava-next-72b-hf": 145.3,
    "LanguageBind/Video-LLaVA-7B-hf": 14.7,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 1.8,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 16.1,
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": 146.4,
    "Qwen/Qwen2-VL-2B-Instruct": 4.4,
    "Qwen/Qwen2-VL-7B-Instruct": 16.6,
    "Qwen/Qwen2-VL-72B-Instruct": 146.8,
    "meta-llama/Llama-3.2-11B-Vision": 21.3,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 21.3,
    "meta-llama/Llama-3.2-90B-Vision": 177.1,
    "meta-llama/Llama-3.2-90B-Vision-Instruct": 177.2,
}
SMALL = ["*.json", "*.jinja", "tokenizer.model"]           # config, tokenizer, template, processor, index of shards
WEIGHTS = ["model*.safetensors", "pytorch_model*.bin"]     # the second only where the first is not to be had
PARTS = {  # what stands in a repository that is no whole model
    "adapter_config.json": "a LoRA adapter",
    "non_lora_trainables.bin": "a LoRA adapter",
    "mm_projector.bin": "a projector",
}


def resolve(name: str | Path, revision: str | None = None, offline: bool = False,
            relative_to: str | Path | None = None, weights: bool = True) -> Path:
    """The folder that `name` stands for: a folder, an alias or a hub id, downloaded where it must be.

    `revision`: a branch, tag or commit of the hub repository. `offline`: use the cache alone. `relative_to`: a folder
    that a relative path may also start from, for the vision tower that an original LLaVA checkpoint names.
    `weights=False`: only the small files, enough for a dry run. Raises with one line about what is missing, gated,
    offline, full or unreachable.
    """
    name = os.path.expanduser(name)
    for folder in [os.path.join(relative_to, name), name] if relative_to else [name]:
        # an alias goes before a folder that happens to bear its name, unless a checkpoint lies there
        if os.path.isdir(folder) and (name not in ALIASES or os.path.isfile(os.path.join(folder, "config.json"))):
            if revision is not None:
                raise MinivlmError(f"{folder} is a folder on disk, it has no revisions: leave out --revision")
            _refuse_part(Path(folder), folder)
            _refuse_meta(Path(folder))
            return Path(folder)
    if os.path.isfile(name):
        raise MinivlmError(f"{name} is a file: give the folder it lies in")
    repository = ALIASES.get(name.lower(), name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise MinivlmError(f"{name!r} is no folder here, no alias and no hub id (owner/name){_meant(name)}: see --list")
    folder = _download(repository, revision, offline, SMALL + (WEIGHTS[:1] if weights else []))
    if not weights and not (folder / "config.json").is_file():
        _refuse_part(folder, repository)
    if weights and not any(folder.glob(WEIGHTS[0])):
        _refuse_part(folder, repository)
        folder = _download(repository, revision, offline, SMALL + WEIGHTS[1:])
        if not any(folder.glob(WEIGHTS[1])):
            raise MinivlmError(f"no weights of {repository} were to be had: it is a projector or adapter alone, "
                               "which must be merged first, or minivlm is offline and lacks them")
    return folder


def _download(repository: str, revision: str | None, offline: bool, patterns: list[str]) -> Path:
    """The repository's files that match, in the cache; a repository's subfolders hold nothing of use here."""
    from huggingface_hub import constants, errors, snapshot_download  # slow; a folder on disk need not wait for it

    hub = constants.ENDPOINT
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=offline,
                                      allow_patterns=patterns, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        told = (f"{repository} is gated: accept its licence at {hub}/{repository}, "
                "then run `hf auth login` or set HF_TOKEN")
        raise MinivlmError(told) from error
    except errors.RevisionNotFoundError as error:
        raise MinivlmError(f"{repository} has no revision {revision!r}: see {hub}/{repository}/commits") from error
    except errors.RepositoryNotFoundError as error:
        told = (f"there is no {repository} at {hub}, and no folder of that name here{_meant(repository)}; "
                "if it is private, run `hf auth login` or set HF_TOKEN")
        raise MinivlmError(told) from error
    except errors.HFValidationError as error:
        raise MinivlmError(f"{repository!r} is no hub id: those read owner/name{_meant(repository)}") from error
    except errors.LocalEntryNotFoundError as error:
        if offline or constants.HF_HUB_OFFLINE:
            why = "minivlm is offline: run once without --offline and HF_HUB_OFFLINE"
        else:
            why = f"{hub} does not answer: check the network, or set HF_ENDPOINT to a mirror"
        raise MinivlmError(f"{repository} is not (wholly) on disk, and {why}") from error
    except (errors.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            told = (f"the disk is full: {repository} needs {GIGABYTES.get(repository, 'some')} GB "
                    f"in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to a folder on another disk")
        else:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            told = f"downloading {repository} from {hub} failed ({reason}): run again, finished files are kept"
        raise MinivlmError(told) from error


def _refuse_part(folder: Path, name: str) -> None:
    """Raises where the folder holds a piece that was trained on top of a model, and not the model."""
    parts = [part for file, part in PARTS.items() if (folder / file).is_file()]
    if parts and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise MinivlmError(f"{name} holds {parts[0]} only: merge it into {_base(folder)}, and give that")


def _refuse_meta(folder: Path) -> None:
    """Raises where the folder holds Meta's own shards of Llama 3.2 Vision; the hub has the same weights as a twin."""
    if (folder / "config.json").is_file() or not any(folder.glob("consolidated*.pth")):
        return
    params = read_json(folder / "params.json")
    size = "90b" if params.get("vision_num_cross_attention_layers") == 20 else "11b"
    alias = f"llama-3.2-{size}-vision" + ("-instruct" if params.get("vision_chunk_size") == 560 else "")
    twin = f"use its twin on the hub, {ALIASES[alias]} ({alias})" if "vision_chunk_size" in params else "use the hub's"
    raise MinivlmError(f"{folder} holds Meta's own .pth shards, another layout of the same weights: {twin}")


def _base(folder: Path) -> str:
    """The model that a part was trained on, to stand inside an error."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        try:
            base = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError, RecursionError):   # it matters little beside what is missing
            continue
        if isinstance(base, str) and base.isprintable():
            return f"the model it was trained on ({base[:100]})"
    return "the model it was trained on"


def _meant(name: str) -> str:
    """A guess at a misspelt alias, to stand inside an error."""
    close = get_close_matches(Path(name).name.lower(), ALIASES, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


# ---- --list ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """One line of `--list`."""

    alias: str
    repository: str
    gigabytes: float
    on_disk: bool


def list_known() -> list[Known]:
    """Every alias, and whether all of its files lie in the cache. Reaches for no network."""
    on_disk = {repository: _is_on_disk(repository) for repository in GIGABYTES}
    return [Known(alias, name, GIGABYTES[name], on_disk[name]) for alias, name in ALIASES.items()]


def _is_on_disk(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json")
    if not isinstance(config, str):
        return False
    for pattern in WEIGHTS:
        files = list(Path(config).parent.glob(pattern))
        shards = re.search(r"-of-(\d+)\.", files[0].name) if files else None      # model-00001-of-00003.safetensors
        if files and len(files) == (int(shards[1]) if shards else 1):
            return True
    return False
