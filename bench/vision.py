"""Vision towers, and the prefill of a picture with a question, in bfloat16 on a CPU. Run: python bench/vision.py

Random weights at real layer shapes, minivlm's packed as `load` packs them, transformers' with its default attention
(SDPA), each in a process of its own. They take turns and medians of the rounds' ratios are printed, since the speed of
a shared machine drifts; "of peak" is the floating-point operations of all matrix products, attention's included, over
the time, as a part of what one large packed product does in the same round. `--layers 8` cuts towers and decoder to
eight layers, all alike, for a quick look: what comes before and behind them then weighs more than it should. The last
table is the peak of resident memory while a tower sees its pictures: no N x N mask or table of scores over
the patches stands in it.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from rivals import options, our_model, ratio, take_turns, their_model, tiny, versions

from minivlm.inputs import Inputs
from minivlm.layers import Linear
from minivlm.models import qwen2_vl
from minivlm.run import keep_freed_memory
from minivlm.vit import ViT, ViTConfig

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}  # fmt: skip
QWEN2_VL_TOWER = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN2_VL_TEXT = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "hidden_act": "silu",
    "use_sliding_window": False, "tie_word_embeddings": True,
}  # fmt: skip
IMAGE_TOKEN = 151655
QUESTION = 32  # tokens
FOUR = "qwen2-vl 4 x 1344"


# ----------------------------------------------------------------------------------------------------------- the cases
# Each builds the model of one side, and returns a function of nothing that runs it, with its floating-point operations.
# `shrink` is `tiny`, or a function that leaves a config as it is.


def fixed_tower(config, side, layers, shrink):
    """CLIP or SigLIP, one square picture."""
    config = shrink({**config, "num_hidden_layers": layers or config["num_hidden_layers"]})
    name = "CLIPVisionModel" if config["model_type"].startswith("clip") else "SiglipVisionModel"
    our = ViTConfig.from_hf(config)
    pixels = torch.randn(1, 3, our.image_size, our.image_size).bfloat16()
    if side == "ours":
        run = partial(our_model(ViT, our), pixels, (-1,), False)
    else:
        import transformers

        run = partial(their_model(getattr(transformers, name), config), pixels)
    N, D = our.grid_side**2, our.hidden_size
    block = 2 * N * (4 * D * D + 2 * D * our.intermediate_size) + 4 * N * N * D
    return run, our.num_layers * block + 2 * N * 3 * our.patch_size**2 * D


def qwen2_vl_tower(pixels, side, layers, shrink, pictures=1):
    """Qwen2-VL's tower on square pictures, `pixels` wide. Which patch is which matters to no one's speed."""
    config = shrink({**QWEN2_VL_TOWER, "depth": layers or QWEN2_VL_TOWER["depth"]})
    our = qwen2_vl.VisionConfig.from_hf(config)
    grid = torch.tensor([[1, pixels // our.patch_size, pixels // our.patch_size]] * pictures)
    patches = torch.randn(int(grid.prod(1).sum()), our.patch_dim).bfloat16()
    if side == "ours":
        run = partial(our_model(qwen2_vl.VisionTower, our), patches, grid)
    else:
        from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

        run = partial(their_model(theirs.Qwen2VisionTransformerPretrainedModel, config), patches, grid_thw=grid)
    return run, tower_flops(our, len(patches), pictures)


def tower_flops(config, P, pictures=1):
    C, wide = config.hidden_size, config.merge**2 * config.hidden_size
    block = 2 * P * (4 * C * C + 2 * C * config.intermediate_size) + 4 * P * (P // pictures) * C
    merger = 2 * (P // config.merge**2) * (wide * wide + wide * config.out_size)
    return config.num_layers * block + merger + 2 * P * config.patch_dim * C


def qwen2_vl_prefill(pixels, side, layers, shrink):
    """Qwen2-VL-2B up to the logits of the first token of an answer, its cache filled."""
    vision = {**QWEN2_VL_TOWER, "depth": layers or QWEN2_VL_TOWER["depth"]}
    text = {**QWEN2_VL_TEXT, "num_hidden_layers": layers or QWEN2_VL_TEXT["num_hidden_layers"]}
    config = shrink({**text, "model_type": "qwen2_vl", "image_token_id": IMAGE_TOKEN, "vision_config": vision})
    our = qwen2_vl.Qwen2VLConfig.from_hf(config)
    P = (pixels // our.vision.patch_size) ** 2
    patches, grid = torch.randn(P, our.vision.patch_dim).bfloat16(), torch.tensor([[1, int(P**0.5), int(P**0.5)]])
    num_tokens = P // our.vision.merge**2
    ids = torch.tensor([[config["image_token_id"]] * num_tokens + list(range(100, 100 + QUESTION))])
    if side == "ours":
        model = our_model(qwen2_vl.Model, our)
        inputs = Inputs(ids, torch.ones_like(ids), pixel_values=patches, image_grid_thw=grid)

        def run():
            return model(inputs, model.new_cache(ids.shape[1] + 1), last_only=True)
    else:
        import transformers

        run = partial(
            their_model(transformers.Qwen2VLForConditionalGeneration, config),
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=patches, image_grid_thw=grid,
            mm_token_type_ids=(ids == config["image_token_id"]).int(), use_cache=True, logits_to_keep=1,
        )  # fmt: skip
    T, D, F = ids.shape[1], config["hidden_size"], config["intermediate_size"]
    width = D + 2 * D * config["num_key_value_heads"] // config["num_attention_heads"]  # of queries, keys and values
    block = 2 * T * (D * width + D * D + 3 * D * F) + 2 * T * T * D  # half of attention's products: it is causal
    flops = tower_flops(our.vision, P) + config["num_hidden_layers"] * block + 2 * D * config["vocab_size"]
    return run, flops


CASES = {
    "clip-l/336": partial(fixed_tower, CLIP),
    "siglip-so400m/384": partial(fixed_tower, SIGLIP),
    "qwen2-vl 448": partial(qwen2_vl_tower, 448),
    "qwen2-vl 1344": partial(qwen2_vl_tower, 1344),
    "qwen2-vl-2b prefill 448": partial(qwen2_vl_prefill, 448),
    FOUR: partial(qwen2_vl_tower, 1344, pictures=4),
}
MEMORY_LAYERS = 2  # what one layer needs is given back before the next


# --------------------------------------------------------------------------------------------------------- the children


class Child:
    """One side of a case in a process of its own, which runs when it is told to."""

    def __init__(self, name, side, layers, small):
        command = [sys.executable, __file__, "--child", name, side, str(layers)] + ["tiny"] * small
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.flops = json.loads(self.process.stdout.readline())

    def run(self):
        """Seconds, and the bytes by which resident memory stood above what it was before, at its peak."""
        print("run", file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def child(name, side, layers, small=""):
    run, flops = CASES[name](side, int(layers), tiny if small else dict)
    if side == "ours":
        keep_freed_memory()  # as the command line does behind a load
    print(json.dumps(flops), flush=True)
    for _ in sys.stdin:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is from now on
        before = peak_memory()
        print(json.dumps([seconds(run), peak_memory() - before]), flush=True)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def seconds(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------- the tables


def matrix_peak(width):
    """A function of nothing that measures the floating-point operations per second of a large packed product."""
    linear = our_model(lambda width: Linear(width, width), width)
    x = torch.randn(2048, width).bfloat16()
    return lambda: 2 * x.shape[0] * width**2 / min(seconds(partial(linear, x)) for _ in range(5))


def speed_table(names, layers, rounds, small):
    peak = matrix_peak(256 if small else 4096)
    print(f"\n{'':26}{'minivlm':>10}{'of peak':>9}{'transformers':>14}{'of peak':>9}{'ratio':>8}")
    for name in names:
        with Child(name, "ours", layers, small) as ours, Child(name, "theirs", layers, small) as theirs:
            turns = take_turns(rounds, lambda ours=ours, theirs=theirs: (peak(), ours.run()[0], theirs.run()[0]))
        peaks, *sides = zip(*turns, strict=True)
        cells = []
        for times in sides:
            share = statistics.median(ours.flops / time / most for time, most in zip(times, peaks, strict=True))
            cells += [f"{statistics.median(times):.2f} s", f"{share:.0%}"]
        print(f"{name:26}{cells[0]:>10}{cells[1]:>9}{cells[2]:>14}{cells[3]:>9}{ratio(*sides):8.2f}", flush=True)
    print(f"peak: {peak() / 1e9:.0f} GFLOP/s")


def memory_table(names, small):
    print(f"\nQwen2-VL's tower, {MEMORY_LAYERS} layers: resident memory at its peak, beyond weights and pixels")
    print(f"{'':26}{'minivlm':>10}{'transformers':>14}")
    for name in names:
        grown = []
        for side in ("ours", "theirs"):
            with Child(name, side, MEMORY_LAYERS, small) as process:
                grown.append(process.run()[1])
        print(f"{name:26}{grown[0] / 1e6:7.0f} MB{grown[1] / 1e6:11.0f} MB", flush=True)
    P = 4 * (1344 // 14) ** 2
    print(f"a bool mask over the {P} patches of all four would be {P * P / 1e6:.0f} MB, a head's scores twice that")


def main():
    speeds = [name for name in CASES if name != FOUR]
    parser = options(__doc__, rounds=3)
    parser.add_argument("--shapes", choices=[*speeds, "memory"], action="append", help="default: all")
    parser.add_argument("--layers", type=int, default=0, help="of tower and decoder (default: as many as there are)")
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    names = args.shapes or [*speeds, "memory"]
    depth = f"{args.layers} layers of each" if args.layers else "all layers"
    print(f"{versions()}, bfloat16, {depth}, medians of {args.rounds} rounds")
    if names != ["memory"]:
        speed_table([name for name in names if name != "memory"], args.layers, args.rounds, args.tiny)
    if "memory" in names:
        memory_table(["qwen2-vl 448"] if args.tiny else ["qwen2-vl 1344", FOUR], args.tiny)


if __name__ == "__main__":
    main()
