"""Small text files of a checkpoint, which may be damaged; and foreign words on one line of an error message."""

import json
from pathlib import Path

from minivlm.errors import MinivlmError


def one_line(text: object, limit: int = 300) -> str:
    """`text` for an error message: one line of at most `limit` characters (cut in the middle), no terminal controls."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - limit // 3 - 3]}...{line[-(limit // 3) :]}"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise MinivlmError(f"{path} is damaged ({one_line(error)}): download it again") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise MinivlmError(f"{path} is damaged ({one_line(error)}): download it again") from error
    if not isinstance(value, dict):
        raise MinivlmError(f"{path} is damaged (a {type(value).__name__} where an object belongs): download it again")
    return value
