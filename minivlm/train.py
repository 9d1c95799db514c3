"""A small training loop: any model of this package, any JSONL of messages.

    python -m minivlm.train --ckpt DIR --data talks.jsonl --out DIR [--steps 1000] [--learning-rate 1e-4]

Each line of the data is `{"messages": [...]}` as in the README; pictures may be paths relative to the file. The loss is the next
token's, on assistant answers alone. Everything is resumable: call it again after an interruption and it goes on where it was.

The parts (`initialise`, `fit`, `next_token_loss`) are also what trains the demo models (`demo/train.py`). What is not here: several
machines, mixed precision beyond bfloat16 autocast, parameter-efficient tuning.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minivlm.errors import MinivlmError
from minivlm.inputs import Inputs

SAVE_EVERY = 200  # steps between saves of the training state
WARMUP = 0.03  # share of the steps over which the learning rate rises
FLOOR = 0.02  # share of the peak that the learning rate ends at


def initialise(model: nn.Module, seed: int = 0):
    """Fresh weights: matrices normal with deviation 1/√(fan in), vectors that scale 1, everything else 0.

    Matrices that write into the residual stream are scaled down by 1/√(2L), so that its variance does not grow with depth (GPT-2).
    """
    generator = torch.Generator().manual_seed(seed)
    depth = max(1, sum(name.endswith(("o_proj.weight", "out_proj.weight")) for name, _ in model.named_parameters()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                is_table = "embed" in name and "patch" not in name
                std = 0.02 if is_table else p[0].numel() ** -0.5
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                    std /= math.sqrt(2 * depth)
                p.normal_(0, std, generator=generator)
            elif name.endswith("norm.weight") or "layernorm" in name or "layer_norm" in name or "layrnorm" in name:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                p.zero_()
            else:  # a lone vector: class token, image_newline
                p.normal_(0, 0.02, generator=generator)


def next_token_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Mean cross-entropy of each answer token given everything before it (labels −100 do not count)."""
    logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs.labels[:, 1:].flatten())


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to `FLOOR` of the peak."""
    warmup = max(1, int(WARMUP * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


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
):
    """AdamW over `batches` (item i is the batch of step i), from wherever `state_file` says an earlier call stopped.

    `loss(batch)` returns a scalar. The state (weights, moments, step) is saved every `SAVE_EVERY` steps and at the end, atomically.
    """
    num_steps = len(batches)
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    def save(step: int):
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        part = state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, state_file)

    loader = DataLoader(batches, batch_size=None, sampler=range(start, num_steps), num_workers=workers)
    device = next(module.parameters()).device.type
    average = None
    module.train()
    bar = tqdm(loader, desc=name, initial=start, total=num_steps, mininterval=5)
    for step, batch in enumerate(bar, start=start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps, learning_rate)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(batch)
        if not math.isfinite(value.item()):
            raise MinivlmError(f"the loss is {value.item()} at step {step}; lower the learning rate and start again")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            save(step + 1)
    if start < num_steps:
        save(num_steps)
    module.eval()
