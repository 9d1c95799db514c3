"""Token ids to text, one by one, as generation needs it. The whole text at once is `Tokenizer.decode` (text.py)."""

import codecs
import re

import tokenizers
from tokenizers import decoders

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Byte-level BPE writes every byte as a visible character: those of Latin-1 as they are, the other 68 from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + n): byte for n, byte in enumerate(_HIDDEN)}


class TextStream:
    """Ids one by one to text, piece by piece: never half a character, and together exactly what `decode` gives.

    A byte-level tokenizer's tokens are bytes, which an incremental UTF-8 decoder joins. In a SentencePiece-like one
    only tokens such as <0xE4> are; a run of them is held back until it ends, because its text depends on the whole run.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool = True):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._skipped = {index for index, token in added.items() if token.special and skip_special}
        byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if byte_level else None
        self._pending: list[int] = []
        self._earlier: list[int] = []  # stands for all earlier text: decoders drop the first space of a text
        self._earlier_text = ""

    def push(self, index: int) -> str:
        """The text that became certain with this id; may be empty."""
        token = self._backend.id_to_token(index)
        if token is None or index in self._skipped:  # an embedding's padding rows have ids without tokens
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(_token_bytes(token))
        self._pending.append(index)
        return "" if _BYTE_TOKEN.fullmatch(token) else self._flush()

    def end(self) -> str:
        """What is left, with � for bytes that are no character."""
        return self._utf8.decode(b"", final=True) if self._utf8 is not None else self._flush()

    def _flush(self) -> str:
        if not self._pending:
            return ""
        text = self._backend.decode(self._earlier + self._pending, skip_special_tokens=False)[len(self._earlier_text) :]
        if not self._earlier:
            self._earlier = self._backend.encode("a", add_special_tokens=False).ids
            self._earlier_text = self._backend.decode(self._earlier, skip_special_tokens=False)
        self._pending = []
        return text


def _token_bytes(token: str) -> bytes:
    """A byte-level token's bytes; an added token with any other character in it stands for itself."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode("utf-8")
