"""`tokenizer.model` without tokenizer.json: the ids of the `sentencepiece` package and of a twin's tokenizer.json."""

import io
import json
import random
import struct
from functools import cache
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers
import tokenizers_tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_tiny import TEMPLATES

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.sentencepiece import read_tokenizer_model
from minivlm.text import Tokenizer, tokenize_chat

LLAMA = {  # the settings of Llama's own model
    "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "character_coverage": 0.999,
}  # fmt: skip
SETTINGS = {
    "llama": LLAMA,
    "no prefix": {**LLAMA, "add_dummy_prefix": False},
    "spaces removed": {**LLAMA, "remove_extra_whitespaces": True},
    "no bytes": {**LLAMA, "byte_fallback": False},
    "own control tokens": {**LLAMA, "control_symbols": ["<|im_start|>", "<|im_end|>"]},
}
FRAGMENTS = [
    "hello", " ", "  ", "   ", "\n", "\t", "\r\n", "object", " the ", "return None", "aaaa", "1234", "...", "<0x0A>",
    "</", "Ünï", "你好", "🙂", "👍🏽", "e\u0301", "ﬁ", "½", "\u200b", "\ufeff", "\x00", "\x7f", "▁", "▁▁",
    "\u3000", "\xa0", "Ａ", "x" * 20, "\U000f0000", "ß", "İ",
]  # fmt: skip


def odd_strings(count, seed=0):
    chosen = random.Random(seed)
    ranges = ((0x20, 0x7F), (0x80, 0xD000), (0xE000, 0x1FFFF))
    for _ in range(count):
        pieces = [
            chosen.choice(FRAGMENTS) if chosen.random() < 0.7 else chr(chosen.randrange(*chosen.choice(ranges)))
            for _ in range(chosen.randrange(25))
        ]
        yield "".join(pieces)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders with a tokenizer.model of 2,000 pieces each, trained on the language reference."""
    lines = [line for text in topics.values() for line in text.splitlines() if line.strip()][::4]
    folders = {}
    for name, settings in SETTINGS.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=2000, minloglevel=2,
            num_threads=1, **settings,
        )  # fmt: skip
        folders[name] = tmp_path_factory.mktemp("sentencepiece")
        (folders[name] / "tokenizer.model").write_bytes(model.getvalue())
    return folders


@cache
def both(path):
    return read_tokenizer_model(path)[0], sentencepiece.SentencePieceProcessor(str(path))


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_equal_sentencepiece(models, name):
    ours, theirs = both(models[name] / "tokenizer.model")
    assert ours.get_vocab_size() == theirs.vocab_size()
    for text in odd_strings(1000):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), text
        if name == "llama":
            assert ours.decode(ids) == theirs.decode(ids)


@given(text=st.text(max_size=50))
def test_ids_equal_sentencepiece_for_any_text(models, text):
    ours, theirs = both(models["llama"] / "tokenizer.model")
    assert ours.encode(text).ids == theirs.encode(text)


def test_the_order_of_merges_matters(models):
    """The trap: pairs sorted by their own text and not by the score of their union."""
    ours, theirs = both(models["llama"] / "tokenizer.model")
    twin = json.loads(ours.to_str())
    twin["model"]["merges"].sort()
    ours = tokenizers.Tokenizer.from_str(json.dumps(twin))
    assert any(ours.encode(text).ids != theirs.encode(text) for text in odd_strings(20))


def test_ids_equal_those_of_the_same_tokenizer_as_json(tmp_path):
    """A tiny Llama-like tokenizer.json, and a tokenizer.model written from its pieces and merges."""
    twin = tokenizers_tiny.llama(added=())
    model = json.loads(twin.to_str())["model"]
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(model["merges"])))}
    message = b""
    for piece, index in sorted(model["vocab"].items(), key=lambda item: item[1]):
        kind = 2 if index == 0 else 3 if index < 3 else 6 if index < 259 else 1
        message += field(1, field(1, piece.encode()) + score(-ranks.get(piece, 9999)) + number(3, kind))
    message += field(2, number(3, 2) + number(35, 1)) + field(3, number(3, 1) + number(4, 0))
    (tmp_path / "tokenizer.model").write_bytes(message)
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "</s>")
    for text in odd_strings(200):
        assert ours.encode(text, add_bos=True) == twin.encode(text).ids
        assert ours.encode(f"a</s>{text}") == twin.encode(f"a</s>{text}", add_special_tokens=False).ids


def varint(value):
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def field(index, content):
    return varint(index * 8 + 2) + varint(len(content)) + content


def number(index, value):
    return varint(index * 8) + varint(value)


def score(value):
    return varint(2 * 8 + 5) + struct.pack("<f", value)


def test_config_files_beside_it_count(models, tmp_path):
    """As in the original LLaVA repositories: flags and names from the config, <image> added by whoever needs it."""
    (tmp_path / "tokenizer.model").write_bytes((models["llama"] / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "pad_token": "<unk>"}))
    tokenizer = Tokenizer.from_folder(tmp_path, extra_tokens=["<image>"])
    assert (tokenizer.bos_token, tokenizer.pad_id, tokenizer.token_to_id("<image>")) == ("<s>", 0, 2000)
    assert tokenizer.encode("hello", add_bos=True) == tokenizer.encode("hello")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]}]
    chat = tokenize_chat(tokenizer, ChatTemplate(TEMPLATES["llava"]), messages)
    assert chat.ids.count(2000) == 1
    assert "What does <image> mean?" in tokenizer.decode(chat.ids)


def test_a_unigram_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(field(1, field(1, b"a")) + field(2, number(3, 1)))
    with pytest.raises(MinivlmError, match="BPE"):
        Tokenizer.from_folder(tmp_path)


@given(place=st.floats(0, 1), insert=st.binary(max_size=3), cut=st.integers(0, 10_000))
def test_damaged_bytes_load_or_end_in_one_line(models, tmp_path_factory, place, insert, cut):
    data = bytearray((models["llama"] / "tokenizer.model").read_bytes())
    start = int(place * len(data))
    data[start : start + cut] = insert
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    path.write_bytes(data)
    try:
        tokenizer, _ = read_tokenizer_model(path)
    except MinivlmError as error:
        assert "\n" not in str(error)
    else:
        tokenizer.encode("hello")
