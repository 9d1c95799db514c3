"""Loading about 1 GB of bfloat16 weights against transformers: seconds and peak memory. Run: python bench/loading.py

A LLaVA-1.5 folder with random weights at real layer shapes; every load runs in a process of its own, after its
imports, from a warm page cache, the rivals taking turns. "ready" is the time until the weights are in the form they
are used in: minivlm packs them for the CPU while it loads; "--dtype float32" converts, "--no-pack" only maps. Peak
memory is the growth of the process's anonymous memory; mapped pages of the file are the system's to take back.
"""

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from rivals import memory, options, ratio, run_child, tiny, write

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


def child(side, folder, dtype, pack):
    """Prints the seconds of one load and the bytes by which anonymous memory grew, at its peak."""
    dtype = getattr(torch, dtype)
    if side == "ours":
        from minivlm.models import llava
        from minivlm.weights import load_weights, read_config

        def load():
            config = read_config(folder)
            with torch.device("meta"):
                model = llava.Model.from_config(config)
            load_weights(model, folder, llava.KEYS, dtype, "cpu", pack=pack == "pack")
            return model
    else:
        from transformers import LlavaForConditionalGeneration

        def load():
            return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)

    before, peaks, done = memory("RssAnon"), [], threading.Event()

    def watch():
        while not done.wait(0.002):
            peaks.append(memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    print(json.dumps([seconds, max(*peaks, memory("RssAnon")) - before]))
    del model


def main():
    parser = options(__doc__, rounds=5)
    parser.add_argument("--dtype", default="bfloat16", help="to load as (default: the file's, %(default)s)")
    parser.add_argument("--no-pack", action="store_true", help="map the weights and leave them as they are")
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    from minivlm.models import llava

    pack = "map" if args.no_pack else "pack"
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), llava, tiny(CONFIG) if args.tiny else CONFIG)
        sides = {"ours": [], "theirs": []}
        for _ in range(args.rounds):  # none to warm up: what was just written is in the page cache
            for side, figures in sides.items():
                figures.append(run_child(side, name, args.dtype, pack))
    how = "mapped" if args.no_pack else "packed"
    print(f"{size / 1e9:.2f} GB of bfloat16 as {args.dtype}, {how}; medians of {args.rounds} rounds")
    print(f"{'':14}{'seconds':>9}{'peak anonymous memory':>24}")
    for side, figures in zip(("minivlm", "transformers"), sides.values(), strict=True):
        seconds, peak = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{side:14}{seconds:9.2f}{peak / 1e9:20.2f} GB")
    print(f"{'ratio':14}{ratio(*([seconds for seconds, _ in figures] for figures in sides.values())):9.2f}")


if __name__ == "__main__":
    main()
