"""What the scripts beside it share: models of random weights, checkpoints on disk, processes of their own, turns.

The speed of a shared machine drifts, so rivals take turns, and what is compared are medians of the turns' ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

# `--tiny` allows no more than this. Heads stay 128 wide, since M-RoPE's sections must fill them.
TINY = {
    "vocab_size": 512, "hidden_size": 256, "embed_dim": 256, "intermediate_size": 512, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_heads": 2, "attention_heads": 2, "vision_output_dim": 6 * 256,
    "image_token_index": 500, "image_token_id": 500,
}  # fmt: skip


def options(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The flags that scripts have in common; a script that measures once has no `rounds`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does this script work at all?")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    return parser


def tiny(config: dict) -> dict:
    """The config at toy sizes, its towers included; layers stay as many as they are."""
    return {
        key: tiny(value) if isinstance(value, dict) else min(value, TINY[key]) if key in TINY else value
        for key, value in config.items()
    }


# ---------------------------------------------------------------------------------------------------------- the models


def our_model(kind: Callable, config) -> torch.nn.Module:
    """In bfloat16, packed as `load` packs it."""
    with torch.device("meta"):
        model = kind(config).bfloat16()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    fill(model)
    for module in model.modules():
        if hasattr(module, "pack"):
            module.pack()
    return model


def their_model(kind: type, config: dict) -> torch.nn.Module:
    model = kind._from_config(kind.config_class(**config), dtype=torch.bfloat16).eval()
    fill(model)
    return model


def write(folder, module, config: dict) -> int:
    """A checkpoint of one of `minivlm.models` in the hub's layout, in bfloat16; returns its bytes."""
    from minivlm.weights import save_weights

    model = module.Model.from_config(config).bfloat16()
    fill(model)
    save_weights(model, folder, module.KEYS)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def fill(model: torch.nn.Module):
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)


# -------------------------------------------------------------------------------------------- processes, turns, figures


def versions() -> str:
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"


def run_child(*arguments: str):
    """What this script prints last, read as JSON, when it is called with `--child` and these in a new process."""
    command = [sys.executable, sys.argv[0], "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def memory(kind: str) -> int:
    """Bytes of this process: `VmRSS` is all that is resident, `RssAnon` leaves out mapped files. Linux only."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith(kind + ":")) * 1024


def take_turns(rounds: int, turn: Callable) -> list:
    """What each of so many turns returned, after one more to warm up."""
    return [turn() for _ in range(rounds + 1)][1:]


def ratio(ours, theirs) -> float:
    """How many times faster we are, from the seconds of each turn."""
    return statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
