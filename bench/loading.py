"""Loading about 1 GB of bfloat16 weights against transformers: seconds and peak memory. Run: python bench/loading.py

A LLaVA-1.5 folder with random weights at real layer shapes; every load runs in a process of its own, after its
imports, from a warm page cache, the rivals taking turns. "ready" is the time until the weights are in the form they
are used in: minivlm packs them for the CPU while it loads; "--dtype float32" converts, "--no-pack" only maps. Peak
memory is the growth of the process's anonymous memory; mapped pages of the file are the system's to take back.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 1, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip

CHILD = """
import json, sys, time, threading
side, folder, dtype, pack = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "pack"
import torch
def anonymous():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
if side == "ours":
    from minivlm.models import llava
    from minivlm.weights import load_weights, read_config
    def load():
        config = read_config(folder)
        with torch.device("meta"):
            model = llava.Model.from_config(config)
        load_weights(model, folder, llava.KEYS, getattr(torch, dtype), "cpu", pack=pack)
        return model
else:
    from transformers import LlavaForConditionalGeneration
    def load():
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
peak, done = 0, False
before = anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
started = time.perf_counter()
model = load()
seconds = time.perf_counter() - started
done = True
thread.join()
print(json.dumps([seconds, max(peak, anonymous()) - before]))
"""


def write(folder):
    import torch

    from minivlm.models import llava
    from minivlm.weights import save_weights

    model = llava.Model.from_config(CONFIG).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    save_weights(model, folder, llava.KEYS)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(p.nbytes for p in model.parameters())


def run(side, folder, dtype, pack):
    command = [sys.executable, "-c", CHILD, side, str(folder), dtype, pack]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="to load as (default: the file's, %(default)s)")
    parser.add_argument("--no-pack", action="store_true", help="map the weights and leave them as they are")
    args = parser.parse_args()
    pack = "map" if args.no_pack else "pack"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder)
        sides = ("ours", "theirs")
        rounds = [[run(side, folder, args.dtype, pack) for side in sides] for _ in range(args.rounds + 1)][1:]
    print(f"{size / 1e9:.2f} GB of bfloat16 as {args.dtype}, {pack}ed; medians of {args.rounds} rounds")
    print(f"{'':14}{'seconds':>9}{'peak anonymous memory':>24}")
    for side, place in (("minivlm", 0), ("transformers", 1)):
        seconds, peak = (statistics.median(r[place][i] for r in rounds) for i in (0, 1))
        print(f"{side:14}{seconds:9.2f}{peak / 1e9:20.2f} GB")
    print(f"{'ratio':14}{statistics.median(t[0] / o[0] for o, t in rounds):9.2f}")


if __name__ == "__main__":
    main()
