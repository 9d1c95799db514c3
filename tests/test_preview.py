"""What is shown before a model runs."""

import pytest
import tokenizers_tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from onevision_tiny import opened
from tiny import picture, turn

from minivlm.preview import draw_tiles, preview, shortened, show_prompt, size
from minivlm.text import Tokenizer

TOKENIZERS = {
    "llama": (Tokenizer(tokenizers_tiny.llama(legacy=False)), "<image>"),
    "qwen2": (Tokenizer(tokenizers_tiny.qwen2()), "<image>"),
    "llama3": (Tokenizer(tokenizers_tiny.llama3()), "<|image|>"),
}


def expanded(tokenizer, text, placeholder, counts):
    """The ids of `text`, each placeholder repeated as often as `counts` says in turn."""
    counts, image_id = iter(counts), tokenizer.token_to_id(placeholder)
    ids = tokenizer.encode(text)
    return [i for token_id in ids for i in [token_id] * (next(counts) if token_id == image_id else 1)]


@pytest.mark.parametrize("style", TOKENIZERS)
def test_prompt_shows_a_run_of_image_tokens_as_its_length(style):
    tokenizer, image = TOKENIZERS[style]
    ids = expanded(tokenizer, f"USER: {image}\nWhat   is {image} this? Größe 🙂", image, [576, 12])
    assert show_prompt(ids, tokenizer) == f"USER: {image}×576\nWhat   is {image}×12 this? Größe 🙂"


@given(st.lists(st.tuples(st.text(alphabet="ab é\n🙂", min_size=1, max_size=5), st.integers(3, 9)), max_size=4))
def test_prompt_is_the_decoded_prompt_but_for_the_runs(parts):
    tokenizer, image = TOKENIZERS["qwen2"]
    text = "".join(word + image for word, _ in parts)
    ids = expanded(tokenizer, text, image, [count for _, count in parts])
    collapsed = "".join(f"{word}{image}×{count}" for word, count in parts)
    assert show_prompt(ids, tokenizer) == collapsed


def test_prompt_shows_words_that_repeat_as_they_are():
    tokenizer, _ = TOKENIZERS["qwen2"]
    assert show_prompt(tokenizer.encode("a a a a!!!!!!\n\n\n\n"), tokenizer) == "a a a a!!!!!!\n\n\n\n"


def test_a_picture_without_tiles_is_shown_without_any():
    """LLaVA-OneVision cuts a picture into tiles that stands alone, and none of several."""
    vlm = opened()[1]
    alone = preview(vlm, [turn("user", picture(43, 86), "What?")], 5)
    several = preview(vlm, [turn("user", picture(43, 86), picture(9, 9), "What?")], 5)
    assert "an overview and 1 × 2 tiles of 43 × 43 pixels" in alone and "tiles" not in several
    assert "picture 2: 9 × 9 pixels" in several


def test_tiles_are_drawn_row_by_row():
    assert draw_tiles(2, 1, torch.zeros(3, 3, 28, 42)) == [
        "    an overview and 2 × 1 tiles of 28 × 42 pixels",
        "    +---+",
        "    |   |",
        "    +---+",
        "    |   |",
        "    +---+",
    ]


def test_a_long_list_loses_its_middle():
    assert shortened(range(24)) == ", ".join(map(str, range(24)))
    assert shortened(range(99)) == ", ".join(map(str, [*range(16), "...", 95, 96, 97, 98]))


@pytest.mark.parametrize("number, text", [(0, "0 bytes"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (14.1e9, "13.1 GiB")])
def test_size_is_readable(number, text):
    assert size(number) == text
