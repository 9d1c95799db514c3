"""Streaming: the pieces together are what `decode` gives, whatever the ids; no piece ends in half a character."""

import pytest
import tokenizers_tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from minivlm.text_stream import TextStream

TOKENIZERS = {
    "llama": tokenizers_tiny.llama(),
    "llama, prefix at the start only": tokenizers_tiny.llama(legacy=False),
    "qwen2": tokenizers_tiny.qwen2(),
    "llama3": tokenizers_tiny.llama3(),
}
for backend in TOKENIZERS.values():
    backend.add_tokens([AddedToken(" ordinary added\n", normalized=False)])
names = st.sampled_from(sorted(TOKENIZERS))
words = st.lists(st.sampled_from(["Ü", "你好", "🙂", "👍🏽", "  ", "\n", "a", "The ", "e\u0301", "\ufffd", "<s>", "1"]))


def pieces_of(stream, ids):
    return [*map(stream.push, ids), stream.end()]


@given(names, st.lists(st.integers(0, 500), max_size=40), st.booleans())
def test_any_ids_give_together_what_decode_gives(name, ids, skip):
    """Includes ids without a token, bytes that are no character, and special tokens within runs of bytes."""
    backend = TOKENIZERS[name]
    ours = "".join(pieces_of(TextStream(backend, skip), ids))
    assert ours == backend.decode(ids, skip_special_tokens=skip)


@given(names, st.data())
def test_runs_of_bytes_give_together_what_decode_gives(name, data):
    """Random ids are rarely neighbouring bytes, so these are chosen from them."""
    backend = TOKENIZERS[name]
    byte_ids = [i for i in range(backend.get_vocab_size()) if i < 260 or len(backend.id_to_token(i)) == 1]
    ids = data.draw(st.lists(st.sampled_from(byte_ids), max_size=20))
    assert "".join(pieces_of(TextStream(backend), ids)) == backend.decode(ids)


@given(names, words)
def test_every_piece_is_whole_characters_in_order(name, words):
    backend = TOKENIZERS[name]
    ids = backend.encode("".join(words), add_special_tokens=False).ids
    text, shown = backend.decode(ids), ""
    for piece in pieces_of(TextStream(backend), ids):
        shown += piece
        assert text.startswith(shown)  # what was shown is never taken back; half a character would show as �
    assert shown == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decoding_ids_one_at_a_time_differs(name):
    backend = TOKENIZERS[name]
    ids = backend.encode("USER: 你好 🙂, how are you?", add_special_tokens=False).ids
    assert "".join(backend.decode([index]) for index in ids) != backend.decode(ids)
    assert "".join(pieces_of(TextStream(backend), ids)) == backend.decode(ids)


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_a_character_appears_with_its_last_byte(name):
    backend = TOKENIZERS[name]
    ids = backend.encode("a😶b", add_special_tokens=False).ids
    assert len(ids) > 3
    pieces = [piece for piece in pieces_of(TextStream(backend), ids) if piece]
    assert pieces == ["a", "😶", "b"]


def test_a_run_of_bytes_is_held_until_it_ends():
    """SentencePiece's decoder turns a whole run into � when its end is damaged, so no part is certain before."""
    backend = TOKENIZERS["llama"]
    ids = [backend.token_to_id(token) for token in ("a", "<0xC3>", "<0xBC>", "<0xC3>", "b")]
    assert pieces_of(TextStream(backend), ids[:3]) == ["a", "", "", "ü"]
    assert pieces_of(TextStream(backend), ids) == ["a", "", "", "", "���b", ""]


class Counter:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, backend):
        self.backend, self.decoder, self.decoded = backend, backend.decoder, 0
        self.encode, self.id_to_token = backend.encode, backend.id_to_token
        self.get_added_tokens_decoder = backend.get_added_tokens_decoder

    def decode(self, ids, skip_special_tokens):
        self.decoded += len(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["many short words " * 100, "你" * 500, "🙂\n a" * 100])
def test_work_per_token_does_not_grow(name, text):
    counter = Counter(TOKENIZERS[name])
    ids = counter.encode(text, add_special_tokens=False).ids
    assert "".join(pieces_of(TextStream(counter), ids)) == TOKENIZERS[name].decode(ids)
    assert counter.decoded <= 4 * len(ids)
