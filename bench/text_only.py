"""What `vision=False` saves: memory of a process that loads Mllama whole, and text only. Run: python bench/text_only.py

Random bfloat16 weights: Llama-3.2-Vision's tower at its real width (a quarter of its layers) before a small text
model. Each load runs in a process of its own, which then answers a question without a picture; what is printed is the
growth of its resident memory, mapped pages of the file included.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

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
        "model_type": "mllama_vision_model", "image_size": 560, "num_hidden_layers": 8, "num_global_layers": 2,
        "intermediate_layers_indices": [1, 2, 3, 4, 5], "vision_output_dim": 7680,
    },
}  # fmt: skip

CHILD = """
import sys
import torch
from minivlm.inputs import Inputs
from minivlm.models import mllama
from minivlm.vlm import VISION_PREFIXES
from minivlm.weights import load_weights, read_config
def resident():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
ids = torch.arange(1, 17)[None]
config = read_config(sys.argv[1])
before = resident()
with torch.device("meta"):
    model = mllama.Model.from_config(config)
skip = [name for name in mllama.KEYS if name.startswith(VISION_PREFIXES)] if sys.argv[2] == "text" else []
report = load_weights(model, sys.argv[1], mllama.KEYS, torch.bfloat16, skip=skip)
with torch.inference_mode():
    model(Inputs(ids, torch.ones_like(ids)))
print(report.num_bytes, resident() - before)
"""


def main():
    import torch

    from minivlm.models import mllama
    from minivlm.weights import save_weights

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = mllama.Model.from_config(CONFIG).bfloat16()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        save_weights(model, folder, mllama.KEYS)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        print(f"{'':12}{'read from the file':>20}{'resident memory':>18}")
        for what in ("whole", "text"):
            command = [sys.executable, "-c", CHILD, str(folder), what]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            read, grown = map(int, output.split())
            print(f"{what + (' only' if what == 'text' else ''):12}{read / 1e6:17.0f} MB{grown / 1e6:15.0f} MB")


if __name__ == "__main__":
    main()
