"""SentencePiece's `tokenizer.model` → the same tokenizer for the `tokenizers` library, which text.py builds on.

The file is a protocol buffer: (field number, value) pairs, nested. Twenty lines read that.
Only BPE models (Llama, Vicuna, Mistral, Yi) are read; Unigram models (T5) are refused.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from minivlm.errors import MinivlmError

BPE = 2  # TrainerSpec.model_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece.type
SPACE = "▁"


def read_tokenizer_model(path: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer, and what tokenizer_config.json would say of it: bos_token, eos_token, unk_token, add_bos_token.

    Every segment between special tokens gets a leading space, as in the tokenizer.json files of the Llama 2 family.
    """
    try:
        return _tokenizer(*_read_model(path.read_bytes()))
    except Exception as error:  # damaged bytes can mean anything, and the library raises nothing more precise
        reason = " ".join(str(error).split())[:300]
        raise MinivlmError(f"{path} is not a SentencePiece BPE model ({reason}); download it again") from error


def _tokenizer(pieces: list[tuple[str, float, int]], trainer: dict, normalizer: dict) -> tuple[Tokenizer, dict]:
    if trainer.get(3, [1])[-1] != BPE:
        raise ValueError(f"its model_type is {trainer.get(3, [1])[-1]}")
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    unknown = next((piece for piece, _, kind in pieces if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(pieces), unk_token=unknown, fuse_unk=True,
            byte_fallback=bool(trainer.get(35, [0])[-1]),
        )
    )  # fmt: skip
    tokenizer.normalizer = _normalizer(normalizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for piece, _, kind in pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece, special=kind != USER_DEFINED, normalized=False)])

    names = {"unk_token": trainer.get(40, [0]), "bos_token": trainer.get(41, [1]), "eos_token": trainer.get(42, [2])}
    config = {name: pieces[index[-1]][0] for name, index in names.items() if index[-1] < len(pieces)}
    return tokenizer, config | {"add_bos_token": "bos_token" in config}


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of a protocol buffer message; a nested message is bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while shift < 64:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise ValueError(f"a number without an end at byte {position}")

    while position < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        elif wire == 2:
            length = varint()
            if position + length > len(data):
                raise ValueError("it ends too early")
            yield number, data[position : position + length]
            position += length
        elif wire in (1, 5):
            form = "<f" if wire == 5 else "<d"
            yield number, struct.unpack_from(form, data, position)[0]
            position += struct.calcsize(form)
        else:
            raise ValueError(f"wire type {wire} at byte {position}")


def _grouped(data: bytes) -> dict[int, list]:
    grouped: dict[int, list] = {}
    for number, value in _fields(data):
        grouped.setdefault(number, []).append(value)
    return grouped


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, list], dict[int, list]]:
    """[(piece, score, type)], TrainerSpec, NormalizerSpec; fields of the specs by their numbers."""
    model = _grouped(data)
    if 1 not in model:
        raise ValueError("it has no pieces")
    pieces = []
    for message in model[1]:
        piece = _grouped(message)
        pieces.append((piece[1][-1].decode("utf-8"), piece.get(2, [0.0])[-1], piece.get(3, [1])[-1]))
    return pieces, *(_grouped(model.get(number, [b""])[-1]) for number in (2, 3))


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best; `tokenizers` wants all such pairs, best first."""
    ordinary = {piece: score for piece, score, kind in pieces if kind == 1}
    pairs = [
        (-score, len(piece[:cut]), piece[:cut], piece[cut:])
        for piece, score in ordinary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _normalizer(spec: dict[int, list]) -> normalizers.Normalizer:
    """NormalizerSpec: a compiled character map, extra spaces removed, a space put in front, spaces written as ▁.

    The map is a trap: `tokenizers` applies it to whole graphemes, so some combining marks come out differently.
    The models of Llama and Mistral have none.
    """
    steps = []
    if spec.get(2, [b""])[-1]:
        steps.append(normalizers.Precompiled(spec[2][-1]))
    if spec.get(4, [1])[-1]:
        extra = {r"\A +": "", " {2,}": " ", rf"[ {SPACE}]+\z": ""}
        steps += [normalizers.Replace(Regex(pattern), content) for pattern, content in extra.items()]
    if spec.get(3, [1])[-1]:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
