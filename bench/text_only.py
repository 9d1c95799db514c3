"""What `vision=False` saves: memory of a process that loads Mllama whole, and text only. Run: python bench/text_only.py

Random bfloat16 weights: Llama-3.2-Vision's tower at its real width (a quarter of its layers) before a small text
model. Each load runs in a process of its own, which then answers a question without a picture; what is printed is the
growth of its resident memory, mapped pages of the file included.
"""

import json
import tempfile
from pathlib import Path

import torch
from rivals import memory, options, run_child, tiny, write

CONFIG = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "image_token_index": 1024,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "mllama_text_model", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 5, "num_attention_heads": 16, "num_key_value_heads": 4, "cross_attention_layers": [1, 3],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {
        "model_type": "mllama_vision_model", "hidden_size": 1280, "intermediate_size": 5120, "attention_heads": 16,
        "image_size": 560, "num_hidden_layers": 8, "num_global_layers": 2,
        "intermediate_layers_indices": [1, 2, 3, 4, 5], "vision_output_dim": 7680,
    },
}  # fmt: skip


def child(folder, what):
    """Prints the bytes read from the file and those by which resident memory grew."""
    from minivlm.inputs import Inputs
    from minivlm.models import mllama
    from minivlm.vlm import VISION_PREFIXES
    from minivlm.weights import load_weights, read_config

    ids = torch.arange(1, 17)[None]
    config = read_config(folder)
    before = memory("VmRSS")
    with torch.device("meta"):
        model = mllama.Model.from_config(config)
    skip = [name for name in mllama.KEYS if name.startswith(VISION_PREFIXES)] if what == "text only" else []
    report = load_weights(model, folder, mllama.KEYS, torch.bfloat16, skip=skip)
    with torch.inference_mode():
        model(Inputs(ids, torch.ones_like(ids)))
    print(json.dumps([report.num_bytes, memory("VmRSS") - before]))


def main():
    args = options(__doc__).parse_args()
    if args.child:
        child(*args.child)
        return
    from minivlm.models import mllama

    with tempfile.TemporaryDirectory() as name:
        write(Path(name), mllama, tiny(CONFIG) if args.tiny else CONFIG)
        print(f"{'':12}{'read from the file':>20}{'resident memory':>18}")
        for what in ("whole", "text only"):
            read, grown = run_child(name, what)
            print(f"{what:12}{read / 1e6:17.0f} MB{grown / 1e6:15.0f} MB")


if __name__ == "__main__":
    main()
