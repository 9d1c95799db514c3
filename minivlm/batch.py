"""A file of questions → a file of answers: `python -m minivlm.run --batch questions.jsonl --output answers.jsonl`.

One JSON object a line, in and out. A row that fails gets a line with its error, and the run goes on. Every line is
handed to the operating system before the next row begins, so that a killed run loses no finished row and the same
command goes on after it.
"""

import hashlib
import json
import sys
from pathlib import Path

from minivlm.console import explain, messages_of, note
from minivlm.errors import MinivlmError

KEYS = {"id", "prompt", "images", "videos", "fps", "num_frames", "system", "messages"}
BEGINNING = b'{"row": '  # of every line that we write


def run_batch(vlm, questions: Path, answers: Path, sampling: dict, stats: bool = False, debug: bool = False) -> int:
    """Answers the rows of `questions` that have no line in `answers` yet; 1 if a row failed, now or in an earlier call.

    A line of `answers` holds `row` (the line's number in `questions`, from 0), `of` (that line's hash, so that a
    changed file is noticed), the row's own `id` if it has one, and either `text`, `token_ids`, `prompt_tokens`,
    `finish_reason` (and `stats` if wanted) or `error`. With `debug` the first error ends the run.
    """
    from tqdm import tqdm

    rows = read_rows(questions)
    failed, done = read_answers(answers, rows)
    if done:
        note(f"{len(done)} of {len(rows)} rows are in {answers} already; going on")
    waiting = {number: line for number, line in rows.items() if number not in done}
    with open_to_append(answers) as file:
        for number, line in tqdm(waiting.items(), initial=len(done), total=len(rows), unit="row", file=sys.stderr):
            written = {"row": number, "of": fingerprint(line)}
            try:
                row = read_row(line)
                written |= {"id": row["id"]} if "id" in row else {}
                (result,) = vlm.generate([question_of(row)], **sampling)
                written |= {
                    "text": result.text,
                    "token_ids": result.token_ids,
                    "prompt_tokens": result.prompt_tokens,
                    "finish_reason": result.finish_reason,
                }
                written |= {"stats": result.stats} if stats else {}
            except Exception as error:  # of whatever kind: it is this row's, and the next row has its own chance
                if debug:
                    raise
                written["error"] = explain(error)
                failed += 1
            file.write(json.dumps(written).encode() + b"\n")
            file.flush()
    if failed:
        note(f"{failed} of {len(rows)} rows failed; to try one again, remove its line from {answers}")
    return 1 if failed else 0


def read_rows(questions: Path) -> dict[int, bytes]:
    """{line number from 0: line}, without blank lines."""
    try:
        lines = questions.read_bytes().split(b"\n")
    except OSError as error:
        raise MinivlmError(f"--batch {questions} cannot be read: {error.strerror}") from error
    return {number: line for number, line in enumerate(lines) if line.strip()}


def read_row(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MinivlmError(f"the row is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise MinivlmError('a row is an object such as {"prompt": "What is this?", "images": ["cat.jpg"]}')
    if unknown := sorted(row.keys() - KEYS):
        raise MinivlmError(f'a row may have {", ".join(sorted(KEYS))}, not {unknown[0]!r}; yours goes under "id"')
    return row


def question_of(row: dict) -> list[dict]:
    if ("messages" in row) == ("prompt" in row) or ("messages" in row and len(row.keys() & KEYS - {"id"}) > 1):
        raise MinivlmError('a row has either "messages", or a "prompt" with "images", "videos", "system" if you like')
    if "messages" in row:
        return row["messages"]
    prompt, system = row["prompt"], row.get("system")
    images, films = row.get("images", []), row.get("videos", [])
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise MinivlmError('"prompt" and "system" are texts')
    if not isinstance(images, list) or not isinstance(films, list):
        raise MinivlmError('"images" and "videos" are lists')
    options = {name: row[name] for name in ("fps", "num_frames") if name in row}
    if options and not films:
        raise MinivlmError('"fps" and "num_frames" are of "videos", of which this row has none')
    return messages_of(prompt, images, system, films, options)


def read_answers(answers: Path, rows: dict[int, bytes]) -> tuple[int, set[int]]:
    """(how many rows failed, which rows have a line). Cuts off a half-written last line; refuses a foreign file."""
    if not answers.exists():
        return 0, set()
    foreign = MinivlmError(f"{answers} holds something other than answers to these questions: choose another --output")
    try:
        *lines, rest = answers.read_bytes().split(b"\n")
    except OSError as error:
        raise MinivlmError(f"--output {answers} cannot be read: {error.strerror}") from error
    if rest[: len(BEGINNING)] != BEGINNING[: len(rest)]:
        raise foreign
    failed, done = 0, set()
    for line in lines:
        try:
            answer = json.loads(line)
            number = answer["row"]
            if answer["of"] != fingerprint(rows[number]):
                raise foreign
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise foreign from error
        done.add(number)
        failed += "error" in answer
    if rest:
        with open(answers, "r+b") as file:
            file.truncate(answers.stat().st_size - len(rest))
    return failed, done


def open_to_append(answers: Path):
    try:
        return open(answers, "ab")
    except OSError as error:
        raise MinivlmError(f"--output {answers} cannot be written: {error.strerror}") from error


def fingerprint(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()[:12]
