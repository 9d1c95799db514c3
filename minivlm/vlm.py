"""`VLM`: processor + model + generation behind a handful of methods; `load` makes one from a checkpoint."""

import importlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm import generate as generation
from minivlm.console import messages_of
from minivlm.errors import MinivlmError
from minivlm.files import read_json
from minivlm.hub import resolve
from minivlm.inputs import Inputs, Prompt, check_lists
from minivlm.models import MODULES, llava_original
from minivlm.models.llava_original import Original
from minivlm.sampling import Sampling
from minivlm.weights import load_weights, read_config, read_headers, save_weights, stored_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """One answer."""

    text: str  # without the stop token, special tokens and the stop string
    token_ids: list[int]  # the new tokens, the stop token included
    prompt_token_ids: list[int]  # the placeholder stands once per image token
    finish_reason: str  # "stop" | "length"
    stats: dict  # seconds and tokens per second, of the whole batch

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens, pictures included."""
        return len(self.prompt_token_ids)


def load(
    name: "str | Path",
    device: "str | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    vision: bool = True,
    revision: str | None = None,
    offline: bool = False,
    weights: bool = True,
) -> "VLM":
    """Opens a checkpoint: an alias (`llava-v1.6`), a hub id, or a folder laid out as on the hub.

    `device` "auto" is the GPU if there is one. `dtype` "auto" is the checkpoint's; on a CPU float16, which CPUs
    hardly compute in, becomes bfloat16 where the processor has it and float32 elsewhere. `vision=False` never reads
    the vision weights: text only. `weights=False` reads no weights at all (a dry run): the model stays on the meta
    device and can only be asked for shapes.
    """
    folder = resolve(name, revision, offline, weights=False)  # a look at the small files before a large download
    config = read_config(folder, str(name))
    is_original = llava_original.is_original(config)
    if not is_original and config["model_type"] not in MODULES:
        raise MinivlmError(f"{folder} is a {config['model_type']!r} model; minivlm knows {', '.join(MODULES)}")
    if weights:
        folder = resolve(name, revision, offline)
    original, tower = open_original(folder, config, offline, weights and vision) if is_original else (None, None)
    config = original.config if original else config
    family = importlib.import_module(MODULES[config["model_type"]])
    device = pick_device(device)
    with torch.device("meta"):
        model = family.Model.from_config(config)
    keys = original.keys if original else family.KEYS
    skip = [] if vision else [prefix for prefix in keys if prefix.startswith(VISION_PREFIXES)]
    dtype = pick_dtype(dtype, device, stored_dtype(folder) if weights else told_dtype(config))
    if weights:
        elsewhere = ["vision_tower"] if tower else []
        load_weights(model, folder, keys, dtype, device, skip=[*skip, *tied_head(model), *elsewhere])
        if tower:
            thrown_away = f"encoder.layers.{model.vision_tower.config.num_layers}"  # in a OneVision's own tower
            others = [*llava_original.NOT_TOWER, thrown_away]
            load_weights(model.vision_tower, tower, llava_original.TOWER_KEYS, dtype, device, skip=others)
    else:
        model.to(dtype)  # still on the meta device: sizes are right, and nothing is read
    model.eval().requires_grad_(False)
    if original:
        processor = family.Processor(model.config, original.tokenizer, original.template, original.images)
    else:
        processor = family.Processor.from_folder(folder, config)
    eos_ids = stop_ids(folder, config, processor.tokenizer)
    return VLM(model, processor, eos_ids, device, family.KEYS, folder, vision, original)


def open_original(folder: Path, config: dict, offline: bool, weights: bool) -> tuple[Original, Path | None]:
    """An original LLaVA checkpoint, and the folder of its vision tower where the weights must come from there.

    1.5 has no tower inside. 1.6 has, but not its sizes: those come from the tower's own place, if it is on disk; else
    minivlm knows them of the usual one. Video-LLaVA has both inside, and not their sizes. `weights=False`: the sizes
    are enough.
    """
    if "mm_video_tower" in config:
        from minivlm.models import video_llava_original  # here, because films bring PyAV with them

        names = video_llava_original.tower_names(config)
        towers = [resolve(name, offline=offline, relative_to=folder, weights=False) for name in names]
        return video_llava_original.read(folder, config, towers), None
    reader = llava_original
    if llava_original.is_onevision(config):
        from minivlm.models import llava_onevision_original as reader  # here, for the same reason
    name = llava_original.tower_name(config)
    outside = weights and not any(tensor.startswith(llava_original.INSIDE) for tensor in read_headers(folder))
    known = name == reader.KNOWN_TOWER
    try:
        tower = resolve(name, offline=offline or (known and not outside), relative_to=folder, weights=outside)
    except MinivlmError as error:
        if outside:
            told = f"{folder} has no vision tower of its own, and mm_vision_tower cannot be opened: {error}"
            raise MinivlmError(told) from error
        if not known:
            raise
        tower = None
    return reader.read(folder, config, tower), tower if outside else None


# What `vision=False` leaves out, under our own names.
VISION_PREFIXES = ("vision", "image", "video", "multi_modal_projector")


def pick_device(device: "str | torch.device") -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise MinivlmError(f"{device!r} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MinivlmError("device cuda was asked for, but torch sees no CUDA GPU here; use device cpu")
    return device


def pick_dtype(dtype: "str | torch.dtype", device: torch.device, stored: torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise MinivlmError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
        return DTYPES[dtype]
    if device.type == "cpu" and stored in (torch.float16, torch.bfloat16):
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return stored


def told_dtype(config: dict) -> torch.dtype:
    """What config.json says of the weights' dtype: under either spelling, outside or in the text part."""
    text = config.get("text_config") or {}
    names = [c.get(key) for c in (config, text) for key in ("dtype", "torch_dtype")]
    return next((DTYPES[name] for name in names if name in DTYPES), torch.float32)


def tied_head(model: nn.Module) -> list[str]:
    """Some tied checkpoints store the head all the same; it is the embedding table, and not read twice."""
    return [] if "language_model.lm_head.weight" in model.state_dict() else ["language_model.lm_head"]


def stop_ids(folder: Path, config: dict, tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json, else config.json, else the tokenizer's own."""
    text = config.get("text_config") or {}
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    for other in (config.get("eos_token_id"), text.get("eos_token_id"), tokenizer.eos_id):
        found = other if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)


class VLM:
    """A loaded checkpoint. `model` is the torch module, `processor` makes its inputs; both can be used alone.

    `**sampling` of the methods below is what `Sampling` takes: max_new_tokens=256, temperature=0.0 (greedy), top_p,
    top_k, min_p, repetition_penalty, num_beams, stop, seed. `template_kwargs` go to the chat template,
    `images_kwargs` override the checkpoint's image settings.
    """

    def __init__(
        self,
        model,
        processor,
        eos_ids: tuple[int, ...],
        device: torch.device,
        keys: dict,
        folder: Path,
        vision: bool,
        original: Original | None = None,
    ):
        self.model, self.processor, self.eos_ids, self.device = model, processor, eos_ids, device
        self.keys, self.folder, self.vision, self.original = keys, folder, vision, original

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.norm.weight.dtype

    def preprocess(
        self,
        conversations: "list[list[dict] | Prompt]",
        template_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        labels: bool = False,
    ) -> Inputs:
        """A batch of conversations → `Inputs` on the model's device, left-padded.

        With `labels`, nothing is generated: the conversations hold answers, and `inputs.labels` is −100 everywhere
        but on them.
        """
        inputs = self.processor(conversations, template_kwargs, images_kwargs, labels, add_generation_prompt=not labels)
        if not self.vision and (inputs.pixel_values is not None or inputs.pixel_values_videos is not None):
            raise MinivlmError("the model was loaded without its vision part (vision=False): show it text alone")
        return inputs.to(self.device, self.dtype)

    def generate(
        self,
        messages: "list[dict] | Prompt | list",
        template_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        **sampling,
    ) -> "Result | list[Result]":
        """The answer to a conversation; for a list of conversations, the list of their answers, each as if alone."""
        one = isinstance(messages, Prompt) or (len(messages) > 0 and isinstance(messages[0], dict))
        begun = time.perf_counter()
        settings = Sampling(**sampling)
        inputs = self.preprocess([messages] if one else messages, template_kwargs, images_kwargs)
        preprocessing = time.perf_counter() - begun
        answers = generation.generate(
            self.model, inputs, settings, self.processor.tokenizer, self.eos_ids, self.processor.tokenizer.pad_id
        )
        prompts = [ids[mask == 1] for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)]
        results = [result_of(a, prompt, preprocessing) for a, prompt in zip(answers, prompts, strict=True)]
        return results[0] if one else results

    def stream(
        self,
        messages: "list[dict] | Prompt",
        template_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        **sampling,
    ) -> "Stream":
        """The answer in pieces, as an iterator; its `result` holds the `Result` once it is exhausted."""
        begun = time.perf_counter()
        settings = Sampling(**sampling)
        inputs = self.preprocess([messages], template_kwargs, images_kwargs)
        preprocessing = time.perf_counter() - begun
        pieces = generation.stream(
            self.model, inputs, settings, self.processor.tokenizer, self.eos_ids, self.processor.tokenizer.pad_id
        )
        return Stream(pieces, inputs.input_ids[0], preprocessing)

    def chat(
        self, message: "str | list[dict]", images: "list | tuple" = (), videos: "list | tuple" = (), **sampling
    ) -> str:
        """The text of the answer to a question about `images` and `videos`, or to a whole conversation."""
        check_lists(images, videos)
        if isinstance(message, str):
            message = messages_of(message, images, films=videos)
        elif images or videos:
            raise MinivlmError("put pictures and films into the messages; images= and videos= are for a question")
        return self.generate(message, **sampling).text

    def save(self, folder: "str | Path"):
        """Writes a checkpoint in the hub's layout, which transformers loads, too: an original LLaVA is converted."""
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise MinivlmError("a model of which not all was read (vision=False, weights=False) cannot be saved")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            is_setting = file.suffix in (".json", ".jinja", ".model") and not file.name.endswith(".index.json")
            if is_setting and file.resolve() != (folder / file.name).resolve():
                shutil.copy(file, folder / file.name)
        rows = {}
        if self.original:
            rows = llava_original.hub_rows(self.original)
            for name, text in llava_original.hub_files(self.original, self.folder).items():
                (folder / name).write_text(text, encoding="utf-8")
        save_weights(self.model, folder, self.keys, rows=rows)


class Stream:
    """Pieces of text; `result` once they are exhausted."""

    def __init__(self, pieces: "generation.Stream", prompt: Tensor, preprocessing: float):
        self.pieces, self.prompt, self.preprocessing = pieces, prompt, preprocessing

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self.pieces)

    @property
    def result(self) -> Result | None:
        answer = self.pieces.result
        return None if answer is None else result_of(answer, self.prompt, self.preprocessing)


def result_of(answer: "generation.Generation", prompt: Tensor, preprocessing: float) -> Result:
    timing = answer.timing
    stats = {
        "preprocessing_seconds": preprocessing,
        "first_token_seconds": preprocessing + timing.first_token,
        "total_seconds": preprocessing + timing.total,
        "tokens_per_second": timing.tokens_per_second,
        "new_tokens": timing.new_tokens,
    }
    return Result(answer.text, answer.token_ids, prompt.tolist(), answer.finish_reason, stats)
