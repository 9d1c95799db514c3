"""How the demo models were made: from nothing to a model that describes posters, on two CPU cores.

    python -m minivlm.demo.train --out minivlm/demo/llava_next

Three stages, in the order that the published models follow, too. The tower learns to see, as CLIP did before LLaVA was
built on it: it is asked about every patch (patches.py). The projector learns to pass on what the tower sees, in vectors
that resemble the language model's words for it. Then both are frozen, and the language model learns to talk about what
they show. From scratch and all at once, it would learn to answer from the question alone and stay blind, and its first
gradients, which are noise, would blind a tower that sees. It takes less than an hour and a half; interrupt it when you
like, the same command goes on.
"""

import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from minivlm.demo.patches import PATCH, TILE, WORDS, Patches, PatchReader, TokenReader
from minivlm.demo.scene import LETTERS
from minivlm.demo.world import LONG_SIDE, TRAIN_SEEDS, conversation, corpus, render
from minivlm.inputs import Inputs
from minivlm.models import llava_next
from minivlm.train import fit, initialise, next_token_losses
from minivlm.weights import save_weights

CANVASES = [[144, 144], [72, 144], [144, 72]]  # (height, width) in pixels
# Longer sides of training pictures in pixels; at LONG_SIDE nothing has to be resized. Users' pictures are larger.
SIDES = (LONG_SIDE, LONG_SIDE, 2 * LONG_SIDE, 216, 180, 336)

SEE_BATCH, TALK_BATCH = 32, 16  # pictures per step
TURNS = 12  # questions per picture: most of the work is looking, so ask as much as possible about each

# ChatML, as in llava-v1.6-34b and llava-next-72b.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ part.text }}<|im_end|>{% endif %}{% endfor %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Capitals that are not the beginning of a word are read letter by letter, digits one by one; a word takes its space
# along, and a place is one word.
SPLIT = r" ?(?:top|bottom) (?:left|right)| ?\p{Lu}(?!\p{Ll})|\p{N}| ?\p{L}+|[^\p{L}\p{N}]"

CONFIG = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": CANVASES,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": 128,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 144,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}


def make_folder(folder: Path):
    """Everything of a checkpoint but its weights, laid out as on the hub."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [*corpus(), *["system", "user", "assistant"] * 10_000],  # the roles stand in every turn: one token each
        trainers.BpeTrainer(vocab_size=508, initial_alphabet=alphabet, show_progress=False),
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in special}

    text = {**CONFIG["text_config"], "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": ids["<|im_end|>"]}
    preprocessor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "crop_size": {"height": TILE, "width": TILE},
        "size": {"shortest_edge": TILE},
        "image_grid_pinpoints": CANVASES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
        "rescale_factor": 1 / 255,
        **{f"do_{step}": True for step in ("center_crop", "convert_rgb", "normalize", "pad", "rescale", "resize")},
    }
    files = {
        "config.json": {**CONFIG, "text_config": text, "image_token_index": ids["<image>"], "torch_dtype": "float16"},
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {
            "processor_class": "LlavaNextProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
        },
        "generation_config.json": {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]},
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


class Talks(Dataset):
    """Batch i: conversations about scenes that no other batch has, as `Inputs` with labels."""

    def __init__(self, processor, num_batches: int, batch_size: int, first_seed: int):
        self.processor = processor
        self.num_batches, self.batch_size, self.first_seed = num_batches, batch_size, first_seed

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index: int):
        start = self.first_seed + index * self.batch_size
        talks = []
        for seed in TRAIN_SEEDS[start : start + self.batch_size]:
            scene, messages = conversation(seed, turns=TURNS)
            side = SIDES[seed % len(SIDES)]
            picture = render(scene, scene.height * side // LONG_SIDE, scene.width * side // LONG_SIDE)
            messages[0]["content"][0]["image"] = picture
            talks.append(messages)
        return padded_behind(self.processor(talks, labels=True, add_generation_prompt=False))


def padded_behind(inputs: Inputs) -> Inputs:
    """The padding goes from before each conversation to behind it, where no token looks: attention then needs no mask
    but the causal one, which halves its work."""
    shifts = (inputs.attention_mask == 0).sum(dim=1)  # (B,)

    def rolled(rows: Tensor) -> Tensor:
        return torch.stack([row.roll(-int(shift)) for row, shift in zip(rows, shifts, strict=True)])

    everything = torch.ones_like(inputs.attention_mask)
    return replace(inputs, input_ids=rolled(inputs.input_ids), labels=rolled(inputs.labels), attention_mask=everything)


def word_id(tokenizer, word: str) -> int:
    """The token that `word` is in an answer: behind a space, or, of a sign's letters, without one."""
    (token,) = tokenizer.encode(word if word in LETTERS else f" {word}")
    return token


@torch.no_grad()
def set_loudness(projector: nn.Module, features: Tensor):
    """Scales what the projector makes of `features (I, P, C)` to a root mean square of 1 per channel.

    That is about as loud as what a decoder's layers add to a token. Let whispered image tokens in, and behind the first
    layer nothing is left of them; let in what shouts, and the layers cannot change it.
    """
    loudness = projector(features).square().mean().sqrt()
    for parameter in projector.linear_2.parameters():
        parameter /= loudness


def answers_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The next token's loss, each answer with the square root of its length.

    By the token, as `next_token_loss` counts, the descriptions would be nearly all of it, and a yes nothing.
    """
    losses, counts = next_token_losses(model, inputs)  # (N,), (B, T - 1)
    begins = counts & ~F.pad(counts, (1, 0))[:, :-1]
    answer = begins.flatten().cumsum(0).view_as(counts)[counts]  # the answer's number, for each of its tokens
    weights = answer.bincount().float().rsqrt()[answer]
    return (weights * losses).sum() / weights.sum()


def main():
    parser = argparse.ArgumentParser(prog="python -m minivlm.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--see", type=int, default=4000, help="steps of the first stage (default: %(default)s)")
    parser.add_argument("--align", type=int, default=600, help="steps of the second stage (default: %(default)s)")
    parser.add_argument("--talk", type=int, default=6700, help="steps of the last stage (default: %(default)s)")
    args = parser.parse_args()

    make_folder(args.out)
    config = json.loads((args.out / "config.json").read_text())
    processor = llava_next.Processor.from_folder(args.out, config)
    model = llava_next.Model.from_config(config)
    initialise(model)
    work = args.out / "training"  # the state of an interrupted run; removed at the end
    work.mkdir(exist_ok=True)

    tower, projector = model.vision_tower, model.multi_modal_projector
    reader = PatchReader(tower, config["vision_config"]["hidden_size"])
    batches = Patches(processor.images, args.see, SEE_BATCH)
    fit(reader, batches, reader.loss, 2e-3, work / "see.pt", name="seeing", muon_decay=0.05)

    tower.requires_grad_(False)
    table = model.language_model.embed_tokens.weight
    words = table[[word_id(processor.tokenizer, word) for word in WORDS]]
    reader = TokenReader(tower, projector, words)
    batches = Patches(processor.images, args.align, SEE_BATCH)
    fit(reader, batches, reader.loss, 2e-3, work / "align.pt", name="aligning")
    set_loudness(projector, tower(batches[0][0], (-1,), True))

    projector.requires_grad_(False)
    batches = Talks(processor, args.talk, TALK_BATCH, first_seed=args.see * SEE_BATCH)  # on pictures that are all new
    # Matrices that hardly decay grow, and with them what the first layer writes, until it drowns what it has read.
    fit(model, batches, partial(answers_loss, model), 1.2e-3, work / "talk.pt", name="talking", muon_decay=0.5)
    save_weights(model.half(), args.out, llava_next.KEYS)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
