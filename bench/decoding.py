"""Decode and prefill in bfloat16 against transformers and the machine's read bandwidth. Run: python bench/decoding.py

Random weights at real layer shapes (`--shapes`); both sides run their own whole generation loop, greedily. Prefill is
the time to the first token, decode the further time divided by the further tokens. The rivals take turns and medians
of the rounds' ratios are printed, since the speed of a shared machine drifts; "of bandwidth" is the weights' bytes
per token over the time per token, as a part of what summing a large tensor reads in the same round.
"""

import statistics
import time
from functools import partial

import torch
from rivals import options, our_model, ratio, take_turns, their_model, tiny, versions

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


def models(config):
    import transformers

    kind = transformers.LlamaForCausalLM if config["model_type"] == "llama" else transformers.Qwen2ForCausalLM
    ours = our_model(TextModel, DecoderConfig.from_hf(config))
    return {"ours": (our_seconds, ours), "theirs": (their_seconds, their_model(kind, config))}


def one_turn(sides, ids, new_tokens, source):
    """{"ours" | "theirs": {"prefill", "decode"} seconds, "bandwidth": bytes per second}."""
    result = {"bandwidth": read_bandwidth(source)}
    for side, (seconds, model) in sides.items():
        prefill = seconds(model, ids, 1)
        decode = (seconds(model, ids, new_tokens + 1) - prefill) / new_tokens
        result[side] = {"prefill": prefill, "decode": decode}
    return result


def main():
    parser = options(__doc__, rounds=5)
    parser.add_argument("--shapes", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: %(default)s")
    args = parser.parse_args()
    source = torch.ones(2**20 if args.tiny else 2**28)  # 1 GiB

    print(f"{versions()}, bfloat16, medians of {args.rounds} rounds")
    for name in args.shapes or SHAPES:
        config = tiny(SHAPES[name]) if args.tiny else SHAPES[name]
        ids = torch.randint(0, config["vocab_size"], (1, args.context), generator=torch.Generator().manual_seed(0))
        sides = models(config)
        parameters = sum(p.numel() for p in sides["theirs"][1].parameters())
        table = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
        bytes_per_token = 2 * (parameters - table)  # of the embedding table one row is read
        turns = take_turns(args.rounds, partial(one_turn, sides, ids, args.new_tokens, source))
        print(f"\n{name}, {args.context} tokens of context")
        print(f"{'':10}{'minivlm':>12}{'transformers':>14}{'ratio':>8}")
        for what, tokens in (("prefill", args.context), ("decode", 1)):
            ours, theirs = ([turn[side][what] for turn in turns] for side in ("ours", "theirs"))
            speeds = [tokens / statistics.median(times) for times in (ours, theirs)]
            print(f"{what:10}{speeds[0]:10.1f}/s{speeds[1]:12.1f}/s{ratio(ours, theirs):8.2f}")
        share = statistics.median(bytes_per_token / turn["ours"]["decode"] / turn["bandwidth"] for turn in turns)
        print(f"decoding reads its weights at {share:.0%} of the speed at which torch sums a large tensor here")


if __name__ == "__main__":
    main()
