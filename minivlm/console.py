"""How a person is told of things, notes on stderr and errors as one line; and a question as messages."""

import sys
from functools import cache

from minivlm.errors import MinivlmError
from minivlm.files import one_line


def messages_of(
    prompt: str, images: list, system: str | None = None, films: list | tuple = (), film_options: dict | None = None
) -> list[dict]:
    """One question as messages. Pictures come first, then films, as the models were trained. `film_options`: `fps` or
    `num_frames`, for all films."""
    content = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": film, **(film_options or {})} for film in films]
    content += [{"type": "text", "text": prompt}]
    before = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*before, {"role": "user", "content": content}]


def note(text: str) -> None:
    print(f"minivlm: {text}", file=sys.stderr, flush=True)


@cache
def note_once(text: str) -> None:
    """A note about a picture or film, which a conversation shows anew with every question."""
    note(text)


def explain(error: Exception) -> str:
    """One line. What is not a MinivlmError is a lack of memory, or a bug."""
    if isinstance(error, MinivlmError):
        return one_line(error, limit=2000)  # a strict load may name many tensors
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "CPUAllocator" in str(error):
        # the last two are torch's, on a GPU and on a CPU, without importing torch
        return "out of memory: --dry-run shows what is needed; try --dtype bfloat16, fewer pictures, or --device cpu"
    return f"unexpected {type(error).__name__}: {one_line(error)} (please report it, with what --debug prints)"
