"""Decode and prefill in bfloat16 against transformers and the machine's read bandwidth. Run: python bench/decoding.py

Random weights at real layer shapes (`--shapes`); both sides run their own whole generation loop, greedily. Prefill is
the time to the first token, decode the further time divided by the further tokens. The rivals take turns and medians
of the rounds' ratios are printed, since the speed of a shared machine drifts; "of bandwidth" is the weights' bytes
per token over the time per token, as a part of what summing a large tensor reads in the same round.
"""

import argparse
import os
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers

from minivlm.decoder import Decoder, DecoderConfig
from minivlm.fuse import BaseModel
from minivlm.generate import generate
from minivlm.inputs import Inputs
from minivlm.sampling import Sampling

VICUNA_7B = {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}  # fmt: skip
QWEN2_HALF_B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "vicuna-7b, 8 of 32 layers": {**VICUNA_7B, "num_hidden_layers": 8},
    "qwen2-0.5b": {**QWEN2_HALF_B, "num_hidden_layers": 24},
}


class NoTokenizer:
    """Speed without words: what `generate` asks of a tokenizer."""

    def decode(self, ids, skip_special=True):  # noqa: ARG002
        return ""

    def stream(self, skip_special=True):  # noqa: ARG002
        return self

    def push(self, token):  # noqa: ARG002
        return ""

    def end(self):
        return ""


class TextModel(BaseModel):
    """The decoder behind the interface that `generate` knows, without a tower."""

    def __init__(self, config):
        super().__init__()
        self.language_model = Decoder(config)

    def embed(self, inputs):
        return self.language_model.embed_tokens(inputs.input_ids)


def our_model(config):
    with torch.device("meta"):
        model = TextModel(DecoderConfig.from_hf(config))
    model = model.to_empty(device="cpu").bfloat16().eval().requires_grad_(False)
    fill(model)
    for module in model.modules():
        if hasattr(module, "pack"):
            module.pack()
    return model


def their_model(config):
    kind = transformers.LlamaForCausalLM if config["model_type"] == "llama" else transformers.Qwen2ForCausalLM
    model = kind._from_config(kind.config_class(**config), dtype=torch.bfloat16).eval()
    fill(model)
    return model


@torch.no_grad()
def fill(model):
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)


def our_seconds(model, ids, new_tokens):
    inputs = Inputs(ids, torch.ones_like(ids))
    sampling = Sampling(max_new_tokens=new_tokens)
    started = time.perf_counter()
    (answer,) = generate(model, inputs, sampling, NoTokenizer(), (), 0)
    assert len(answer.token_ids) == new_tokens
    return time.perf_counter() - started


@torch.inference_mode()
def their_seconds(model, ids, new_tokens):
    mask = torch.ones_like(ids)
    started = time.perf_counter()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
    return time.perf_counter() - started


def read_bandwidth(source):
    """Bytes per second of summing a tensor far larger than the caches."""
    started = time.perf_counter()
    source.sum()
    return source.nbytes / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    source = torch.ones(2**28)  # 1 GiB

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, bfloat16, medians of {args.rounds} rounds")
    for name in args.shapes or SHAPES:
        config = SHAPES[name]
        ids = torch.randint(0, config["vocab_size"], (1, args.context), generator=torch.Generator().manual_seed(0))
        sides = {"ours": (our_seconds, our_model(config)), "theirs": (their_seconds, their_model(config))}
        parameters = sum(p.numel() for p in sides["theirs"][1].parameters())
        table = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
        bytes_per_token = 2 * (parameters - table)  # of the embedding table one row is read
        rounds = [one_round(sides, ids, args.new_tokens, source) for _ in range(args.rounds + 1)][1:]  # one to warm up
        print(f"\n{name}, {args.context} tokens of context")
        print(f"{'':10}{'minivlm':>12}{'transformers':>14}{'ratio':>8}")
        for what, tokens in (("prefill", args.context), ("decode", 1)):
            ours, theirs = ([r[side][what] for r in rounds] for side in ("ours", "theirs"))
            ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
            speeds = (tokens / statistics.median(times) for times in (ours, theirs))
            print(f"{what:10}{next(speeds):10.1f}/s{next(speeds):12.1f}/s{ratio:8.2f}")
        share = statistics.median(bytes_per_token / r["ours"]["decode"] / r["bandwidth"] for r in rounds)
        print(f"decoding reads its weights at {share:.0%} of the speed at which torch sums a large tensor here")


def one_round(sides, ids, new_tokens, source):
    """{"ours" | "theirs": {"prefill", "decode"} seconds, "bandwidth": bytes per second}."""
    result = {"bandwidth": read_bandwidth(source)}
    for side, (seconds, model) in sides.items():
        prefill = seconds(model, ids, 1)
        decode = (seconds(model, ids, new_tokens + 1) - prefill) / new_tokens
        result[side] = {"prefill": prefill, "decode": decode}
    return result


if __name__ == "__main__":
    main()
