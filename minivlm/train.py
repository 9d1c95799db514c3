"""A small training loop: any model of this package, any JSONL of messages.

    python -m minivlm.train --ckpt DIR --data talks.jsonl --out DIR [--steps 1000] [--learning-rate 1e-4]

Each line of the data is `{"messages": [...]}` as in the README; pictures may be paths relative to the file. The loss
is the next token's, on assistant answers alone. Everything is resumable: call it again after an interruption and it
goes on where it was.

The parts (`initialise`, `fit`, `next_token_loss`) also train the demo models (`demo/train.py`). What is not here:
several machines, mixed precision beyond bfloat16 autocast, parameter-efficient tuning.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minivlm.console import explain, note
from minivlm.conversation import IGNORED, IMAGE_KEYS, VIDEO_KEYS
from minivlm.errors import MinivlmError
from minivlm.inputs import Inputs
from minivlm.vlm import VLM, load

SAVE_EVERY = 200  # steps between saves of the training state
MUON_PACE = 4.0  # Muon's learning rate : AdamW's
WARMUP = 0.03  # share of the steps over which the learning rate rises
FLOOR = 0.02  # share of the peak that the learning rate ends at


def initialise(model: nn.Module, seed: int = 0):
    """Fresh weights: matrices normal with deviation 1/√(fan in), vectors that scale 1, everything else 0.

    Matrices that write into the residual stream are scaled down by 1/√(2L), so that its variance does not grow with
    depth (GPT-2).
    """
    generator = torch.Generator().manual_seed(seed)
    depth = max(1, sum(name.endswith(("o_proj.weight", "out_proj.weight")) for name, _ in model.named_parameters()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                is_table = "embed" in name and "patch" not in name
                std = 0.02 if is_table else p[0].numel() ** -0.5
                if "projector" in name:  # towers speak louder than token embeddings: the decoder would not hear itself
                    std /= 5
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                    std /= math.sqrt(2 * depth)
                p.normal_(0, std, generator=generator)
            elif name.endswith("norm.weight") or "layernorm" in name or "layer_norm" in name or "layrnorm" in name:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                p.zero_()
            else:  # a lone vector: class token, image_newline
                p.normal_(0, 0.02, generator=generator)


def next_token_losses(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each answer token given everything before it `(N,)`, and which of `labels[:, 1:]` those are.

    Labels of −100 do not count. Of a conversation's tokens few are the assistant's, and the head is as wide as the
    vocabulary, so it is asked for those alone.
    """
    wanted = inputs.labels[:, 1:]
    counts = wanted != IGNORED  # (B, T - 1)
    head = model.language_model.lm_head
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][counts],))
    try:
        logits = model(inputs)  # (N, V)
    finally:
        hook.remove()
    return F.cross_entropy(logits, wanted[counts], reduction="none"), counts


def next_token_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Mean over all answer tokens."""
    return next_token_losses(model, inputs)[0].mean()


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to `FLOOR` of the peak."""
    warmup = max(1, int(WARMUP * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(
    module: nn.Module, weight_decay: float, muon_decay: float | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for all that requires a gradient; with `muon_decay`, Muon for the matrices inside layers, which decay by
    that, and AdamW for the rest.

    A group's learning rate is the schedule's times its `pace`.
    """
    muon = muon_decay is not None
    if muon and not hasattr(torch.optim, "Muon"):
        raise MinivlmError(f"Muon came with torch 2.9, and this is {torch.__version__}: install a later one")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inner = {name: p for name, p in trained.items() if muon and p.dim() == 2 and "layers." in name}
    outer = [p for name, p in trained.items() if name not in inner]
    groups = [  # weight decay is for matrices: norms and biases have no reason to be small
        {"params": [p for p in outer if p.dim() >= 2], "weight_decay": weight_decay, "pace": 1.0},
        {"params": [p for p in outer if p.dim() < 2], "weight_decay": 0.0, "pace": 1.0},
    ]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if inner:
        groups = [{"params": list(inner.values()), "weight_decay": muon_decay, "pace": MUON_PACE}]
        optimizers.append(torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def fit(
    module: nn.Module,
    batches: Dataset,
    loss: Callable[[object], Tensor],
    learning_rate: float,
    state_file: Path,
    weight_decay: float = 0.05,
    autocast: bool = True,
    workers: int = 1,
    name: str = "training",
    muon_decay: float | None = None,
):
    """Training over `batches` (item i is the batch of step i), from wherever `state_file` says an earlier call stopped.

    AdamW; with `muon_decay`, the matrices inside layers are updated by Muon (Jordan et al. 2024), which makes every
    direction of an update equally large. From scratch that is worth several times as many steps; for the fine-tuning of
    weights that AdamW made, AdamW is what is known to work. Muon's weights decay at a rate of their own.

    `loss(batch)` returns a scalar. The state (weights, moments, step) is saved every `SAVE_EVERY` steps and at the end,
    atomically. Parameters that require no gradient stay as they are.
    """
    num_steps = len(batches)
    optimizers = make_optimizers(module, weight_decay, muon_decay)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]

    def save(step: int):
        moments = [optimizer.state_dict() for optimizer in optimizers]
        state = {"module": module.state_dict(), "optimizers": moments, "step": step}
        part = state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, state_file)

    loader = DataLoader(batches, batch_size=None, sampler=range(start, num_steps), num_workers=workers)
    device = next(module.parameters()).device.type
    average = None
    module.train()
    bar = tqdm(loader, desc=name, initial=start, total=num_steps, mininterval=5)
    for step, batch in enumerate(bar, start=start):
        rate = learning_rate_at(step, num_steps, learning_rate)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["pace"]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(batch)
        if not math.isfinite(value.item()):
            raise MinivlmError(f"the loss is {value.item()} at step {step}; lower the learning rate and start again")
        module.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            save(step + 1)
    if start < num_steps:
        save(num_steps)
    module.eval()


class Conversations(Dataset):
    """Batch i of a JSONL file's conversations, in an order that is drawn anew, from its seed, every time round."""

    def __init__(self, vlm: VLM, file: Path, num_batches: int, batch_size: int, seed: int = 0):
        self.vlm, self.num_batches, self.batch_size, self.seed = vlm, num_batches, batch_size, seed
        self.talks = read_conversations(file)

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index: int) -> Inputs:
        size = len(self.talks)
        numbers = range(index * self.batch_size, (index + 1) * self.batch_size)
        chosen = [self.talks[self.order(n // size)[n % size]] for n in numbers]
        return self.vlm.preprocess(chosen, labels=True)

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.talks), generator=generator).tolist()


def read_conversations(file: Path) -> list[list[dict]]:
    """The `messages` of every line; paths of pictures and films are taken relative to the file."""
    if not file.is_file():
        raise MinivlmError(f"{file} is not there; --data wants a JSONL file of conversations")
    talks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            answered = any(message["role"] == "assistant" for message in messages)
            talks.append(
                [{**message, "content": _relative_to(file.parent, message["content"])} for message in messages]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MinivlmError(f'{file}, line {number} is not {{"messages": [...]}} ({error!r})') from error
        if not answered:
            raise MinivlmError(f"{file}, line {number} holds no answer of the assistant to learn from")
    if not talks:
        raise MinivlmError(f"{file} holds no conversation")
    return talks


def _relative_to(folder: Path, content: "str | list[dict]") -> "str | list[dict]":
    if isinstance(content, str):
        return content

    def resolve(key: str, value):
        if isinstance(value, list):  # frames
            return [resolve(key, frame) for frame in value]
        if isinstance(value, dict):  # OpenAI's
            return {inner: resolve(inner, file) for inner, file in value.items()}
        if (
            key not in IMAGE_KEYS + VIDEO_KEYS
            or not isinstance(value, str)
            or value.startswith(("data:", "http", "file:"))
        ):
            return value
        return str(folder / value)

    return [{key: resolve(key, value) for key, value in part.items()} for part in content]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minivlm.train",
        description="Trains a checkpoint further on your own conversations. Interrupted, the same command goes on.",
    )
    parser.add_argument("--ckpt", required=True, help="where to start: alias, hub id or folder")
    parser.add_argument("--data", type=Path, required=True, help='JSONL file, {"messages": [...]} per line')
    parser.add_argument("--out", type=Path, required=True, help="folder for the new checkpoint")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak (default: %(default)s)")
    parser.add_argument("--freeze", action="append", default=[], metavar="PART", help="keep as it is, say vision_tower")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    try:
        train(parser.parse_args(argv))
    except MinivlmError as error:
        note(explain(error))
        return 1
    return 0


def train(args: argparse.Namespace):
    vlm = load(args.ckpt, device=args.device, dtype="float32")
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(args.freeze)))
    batches = Conversations(vlm, args.data, args.steps, args.batch_size)
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "training.pt"
    fit(vlm.model, batches, lambda batch: next_token_loss(vlm.model, batch), args.learning_rate, state, workers=0)
    vlm.save(args.out)
    state.unlink()


if __name__ == "__main__":
    sys.exit(main())
