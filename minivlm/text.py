"""Text to token ids and back, and a conversation to ids.

`Tokenizer` wraps a checkpoint's tokenizer files; `tokenize_chat` joins it with the chat template: messages in, ids out,
with ONE placeholder id per picture (the model's processor multiplies them). What a user types is never parsed as a
special token: `<image>` or `</s>` inside a message is text, as it is on this page.

Ids equal transformers' for the same files. No model is known here: what a token means is read from the checkpoint.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from os.path import commonprefix
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.files import one_line, read_json
from minivlm.sentencepiece import read_tokenizer_model
from minivlm.text_stream import TextStream

PRIVATE_USE = range(0xE000, 0xF900)  # characters that no tokenizer's rule and no template's filter knows
Span = tuple[int, int]  # start, end in characters


class Tokenizer:
    """Token ids from text and text from token ids, as the checkpoint's own files define them."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict | None = None):
        """`backend` as in tokenizer.json, `config` as in tokenizer_config.json."""
        config = config or {}
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self._add_declared_tokens(config.get("added_tokens_decoder") or {})
        literals = {key: _literal(value) for key, value in config.items() if key.endswith("_token")}
        # Name → literal: bos_token, eos_token, …, the names that chat templates use.
        self.special_tokens = {key: literal for key, literal in literals.items() if literal is not None}
        self.bos_token, self.eos_token = map(self.special_tokens.get, ("bos_token", "eos_token"))
        for token in (self.bos_token, self.eos_token):
            if token is not None and backend.token_to_id(token) is None:
                raise MinivlmError(
                    f"tokenizer_config.json names {token!r}, which the tokenizer does not have; "
                    "they are of different checkpoints, download both again"
                )
        self._before, self._after = self._framing(config)

    @classmethod
    def from_folder(cls, folder: str | Path, extra_tokens: Iterable[str] = ()) -> "Tokenizer":
        """From tokenizer.json (or tokenizer.model), tokenizer_config.json, special_tokens_map.json, added_tokens.json.

        `extra_tokens`: special tokens to append where the tokenizer lacks them (the original LLaVA's have no <image>).
        """
        folder = Path(folder)
        config = {key: value for key, value in read_json(folder / "tokenizer_config.json").items() if value is not None}
        config = read_json(folder / "special_tokens_map.json") | config
        if not config.get("added_tokens_decoder"):
            listed = read_json(folder / "added_tokens.json")
            config["added_tokens_decoder"] = {index: {"content": token} for token, index in listed.items()}
        if (folder / "tokenizer.json").is_file():
            flags = ("add_bos_token", "add_eos_token")  # transformers, too, passes over them where there is this file
            config = {key: value for key, value in config.items() if key not in flags}
            with _reading(folder / "tokenizer.json"):
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                backend.encode("a")
        elif (folder / "tokenizer.model").is_file():
            backend, defaults = read_tokenizer_model(folder / "tokenizer.model")
            config = defaults | config
        else:
            raise MinivlmError(f"{folder} has no tokenizer.json and no tokenizer.model; download one of them")
        try:
            tokenizer = cls(backend, config)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise MinivlmError(
                f"{folder / 'tokenizer_config.json'} is malformed ({one_line(error)}); download it again"
            ) from error
        # After those that the files declare, which have their ids from there.
        missing = [token for token in extra_tokens if backend.token_to_id(token) is None]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in missing])
        return tokenizer

    def _add_declared_tokens(self, declared: dict) -> None:
        """Adds the tokens that tokenizer_config.json declares and the tokenizer lacks, at the ids it gives them."""
        known = self.backend.get_added_tokens_decoder()
        for index, entry in sorted((int(index), entry) for index, entry in declared.items()):
            content = _literal(entry)
            if content is None or (index in known and known[index].content == content):
                continue
            flags = {key: bool(entry.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
            self.backend.add_tokens([AddedToken(content, special=bool(entry.get("special", True)), **flags)])
            found = self.backend.token_to_id(content)
            if found != index:
                raise MinivlmError(
                    f"tokenizer_config.json gives {content!r} the id {index}, the tokenizer gives it {found}; "
                    "they are of different checkpoints, download both again"
                )

    def _framing(self, config: dict) -> tuple[list[int], list[int]]:
        """Ids before and after a text: by tokenizer.json's own rule, else by add_bos_token and add_eos_token."""
        if self.backend.post_processor is None:
            return (
                [self.bos_id] if config.get("add_bos_token") and self.bos_token else [],
                [self.eos_id] if config.get("add_eos_token") and self.eos_token else [],
            )
        plain, framed = (self.backend.encode("a", add_special_tokens=add).ids for add in (False, True))
        start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return framed[:start], framed[start + len(plain) :]

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return self.token_to_id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self.token_to_id(self.eos_token)

    @property
    def pad_token(self) -> str | None:
        """The checkpoint's pad token, else EOS, else BOS: padding is masked, any token of the vocabulary will do."""
        candidates = (self.special_tokens.get("pad_token"), self.eos_token, self.bos_token)
        return next((token for token in candidates if self.token_to_id(token) is not None), None)

    @property
    def pad_id(self) -> int:
        return 0 if self.pad_token is None else self.token_to_id(self.pad_token)

    def token_to_id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of an already rendered prompt: special tokens in `text` ARE parsed.

        `add_bos`: add what this tokenizer puts around a text (BOS for Llama, nothing for Qwen), unless BOS is there.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        before, after = self.frame(text) if add_bos else ([], [])
        return before + ids + after

    def frame(self, text: str) -> tuple[list[int], list[int]]:
        """Ids to put before and after those of `text`: none where it starts with BOS already."""
        if self.bos_token is not None and text.startswith(self.bos_token):
            return [], []
        return self._before, self._after

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, without tokenizer_config's "clean-up" of spaces, which is meant for other tokenizers."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder that takes ids one by one: `push(id)` and `end()` give text."""
        return TextStream(self.backend, skip_special)

    # --- what users type ----------------------------------------------------------------------------------------------

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _literals(self) -> list[str]:
        """The added tokens that a user must not be able to write. One character or a run of spaces is ordinary text."""
        return [token.content for token in self._added.values() if len(token.content.strip()) > 1]

    @cached_property
    def _literal_patterns(self) -> tuple[re.Pattern, re.Pattern, set[str]]:
        """A first character of a literal; a literal; every proper beginning of one, in small letters."""
        first = re.compile("[" + re.escape("".join({literal[0] for literal in self._literals})) + "]", re.IGNORECASE)
        whole = re.compile("|".join(map(re.escape, self._literals)), re.IGNORECASE)
        return first, whole, {literal[:end].lower() for literal in self._literals for end in range(1, len(literal))}

    def guard(self, text: str, mark: str) -> str:
        """`text` with the character `mark` behind the first character of every literal, so that none is left in it.

        Literals in other case count (a template may call `lower`), and so does one that only begins at the text's end:
        the next part may bring the rest.
        """
        if not self._literals:
            return text
        first, whole, beginnings = self._literal_patterns
        starts = {match.start() for match in first.finditer(text) if whole.match(text, match.start())}
        stripped = text.rstrip()
        for length in range(1, min(len(stripped), max(map(len, self._literals))) + 1):
            if stripped[-length:].lower() in beginnings:
                starts.add(len(stripped) - length)
        cuts = [0, *sorted(start + 1 for start in starts), len(text)]
        return mark.join(text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))

    def encode_guarded(self, text: str, mark: str) -> tuple[list[int], list[Span]]:
        """Ids of a prompt in which `mark` guards what users typed, and the span of each in the prompt without marks.

        The same as encoding the prompt without marks, unless that would parse what a user typed. Then the prompt is
        encoded by a tokenizer that knows no added tokens but stand-ins for those which the template wrote, so that
        everything around the literal still gets the ids that it always gets.
        """
        clean = text.replace(mark, "")
        encoding = self.backend.encode(clean, add_special_tokens=False)
        if mark in text:
            guarded = self._parsed_tokens(text, self.backend.encode(text, add_special_tokens=False))
            written = [(i, a - text.count(mark, 0, a), b - text.count(mark, 0, b)) for i, a, b in guarded]
            if written != self._parsed_tokens(clean, encoding):
                return self._encode_with_stand_ins(clean, written)
        return encoding.ids, encoding.offsets

    def _parsed_tokens(self, text: str, encoding: tokenizers.Encoding) -> list[tuple[int, int, int]]:
        """(id, start, end) of every added token; an unknown character has <unk>'s id, hence the look at the text."""
        return [
            (index, start, end)
            for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if index in self._added and self._added[index].content in text[start:end]
        ]

    def _encode_with_stand_ins(self, text: str, written: list[tuple[int, int, int]]) -> tuple[list[int], list[Span]]:
        stand_ins, backend = self._plain_backend(*_unused_characters(text, 2))
        ours, shifts, done = "", [], 0
        for index, start, end in written:
            token = self._added[index]
            start = text.index(token.content, start, end)  # lstrip and rstrip tokens eat spaces, too
            ours += text[done:start] + stand_ins[_flags(token)]
            done = start + len(token.content)
            shifts.append(done - len(ours))
        encoding = backend.encode(ours + text[done:], add_special_tokens=False)
        ids, spans, shift, turn = [], [], 0, 0
        stand_in_ids = {backend.token_to_id(literal) for literal in stand_ins.values()}
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index in stand_in_ids:
                index, start, end = written[turn]
                shift = shifts[turn]
                turn += 1
            else:
                start, end = start + shift, end + shift
            ids.append(index)
            spans.append((start, end))
        return ids, spans

    def _plain_backend(self, a: str, b: str) -> tuple[dict[tuple, str], tokenizers.Tokenizer]:
        """A twin with one stand-in per kind of added token (flags → literal), made when a user first types one."""
        if a not in self._plain:
            kinds = sorted({_flags(token) for token in self._added.values()})
            stand_ins = {flags: a + b * n + a for n, flags in enumerate(kinds)}
            twin = json.loads(self.backend.to_str()) | {"added_tokens": [], "post_processor": None}
            with _reading("tokenizer.json"):  # of two tokens with the same id, for example, one was not written
                backend = tokenizers.Tokenizer.from_str(json.dumps(twin))
            for (lstrip, rstrip, normalized), literal in stand_ins.items():
                backend.add_tokens([AddedToken(literal, lstrip=lstrip, rstrip=rstrip, normalized=normalized)])
            self._plain = {a: (stand_ins, backend)}
        return self._plain[a]

    @cached_property
    def _plain(self) -> dict[str, tuple]:
        return {}


@contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    """The library's errors have no class of their own, and its panics over damaged files are not even Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise MinivlmError(f"{what} is damaged ({one_line(error)}); download it again") from error


def _flags(token: AddedToken) -> tuple[bool, bool, bool]:
    return token.lstrip, token.rstrip, token.normalized


def _literal(value: object) -> str | None:
    """A special token's text, which configs write as a string or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _unused_characters(text: str, count: int) -> list[str]:
    """Private-use characters that do not occur in `text`."""
    used = set(text)
    free = list(islice((chr(code) for code in PRIVATE_USE if chr(code) not in used), count))
    if len(free) < count:
        raise MinivlmError("the messages use up all of Unicode's private-use characters; leave some of them out")
    return free


# --- messages → ids ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedChat:
    """`ids`, one placeholder per picture or film; `is_answer`: which of them the assistant says; `text`: the prompt."""

    ids: list[int]
    is_answer: list[bool]
    text: str


def tokenize_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict],
    add_generation_prompt: bool = True,
    kwargs: dict | None = None,
    answers: bool = True,
) -> TokenizedChat:
    """Renders and encodes messages. What users typed stays text; BOS is added unless the template wrote it.

    `kwargs` are further template variables. `answers=False` leaves `is_answer` all False, which saves rendering every
    beginning of the conversation where a template has no `{% generation %}` tags.
    """
    messages = [message | {"content": _parts(message.get("content"))} for message in messages]
    variables = tokenizer.special_tokens | (kwargs or {})
    strings = [template.source]
    _map_strings([messages, variables], lambda string: strings.append(string) or string)
    mark, *answer_marks = _unused_characters("".join(strings), 3)
    guarded = _map_strings(messages, lambda string: tokenizer.guard(string, mark))

    def render(messages: list[dict], add_generation_prompt: bool) -> str:
        return template.render(messages, add_generation_prompt, variables, answer_marks)

    text = render(guarded, add_generation_prompt)
    if answers and answer_marks[0] not in text:
        text = _mark_answers(text, guarded, render, answer_marks)
    text, spans = _take_answer_marks(text, mark, answer_marks)
    ids, offsets = tokenizer.encode_guarded(text, mark)
    before, after = tokenizer.frame(text)
    # A token that reaches beyond an answer (its last space and the next turn's bracket, say) is not of the answer.
    is_answer = [answers and any(start < end <= stop for start, stop in spans) for _, end in offsets]
    return TokenizedChat(
        before + ids + after, [False] * len(before) + is_answer + [False] * len(after), text.replace(mark, "")
    )


def _parts(content: object) -> object:
    """Content as a list of parts: the LLaVA-style templates silently drop a string."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _map_strings(value: object, function: Callable[[str], str], key: str = "") -> object:
    """A copy with `function` applied to every string but roles and types, which are structure."""
    if isinstance(value, dict):
        return {key: _map_strings(item, function, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, function, key) for item in value]
    return function(value) if isinstance(value, str) and key not in ("role", "type") else value


def _mark_answers(
    text: str, messages: list[dict], render: Callable[[list[dict], bool], str], marks: list[str]
) -> str:
    """`text` with marks around the answers, for a template that does not say by itself where they are.

    An answer is what a rendering up to and with it has more than the one that asks for it, as far as `text` agrees.
    """
    pieces, done = [], 0
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, asked = render(messages[:turn], False), render(messages[:turn], True)
        after = render(messages[: turn + 1], False)
        start, end = len(commonprefix([asked, after])), len(commonprefix([text, after]))
        if start > end or not before.endswith(after[end:]):  # more than an EOS that ends the last turn only
            # Earlier turns read differently here (without a later turn's picture, say), but this one may be the same.
            header = len(commonprefix([before, after]))
            shift = text.find(after[header:], done) - header
            if shift < -header:
                raise MinivlmError(
                    "cannot tell what the assistant says in this prompt: the chat template writes a turn differently "
                    "when others follow; use a template with {% generation %} tags"
                )
            start, end = start + shift, len(after) + shift
        pieces += [text[done:start], marks[0], text[start:end], marks[1]]
        done = end
    return "".join(pieces) + text[done:]


def _take_answer_marks(text: str, mark: str, answer_marks: list[str]) -> tuple[str, list[Span]]:
    """The text without answer marks, and the spans between them, counted without `mark`, too."""
    pieces, spans, position, start = [], [], 0, 0
    for piece in re.split(f"([{''.join(answer_marks)}])", text):
        if piece == answer_marks[0]:
            start = position
        elif piece == answer_marks[1]:
            spans.append((start, position))
        else:
            pieces.append(piece)
            position += len(piece) - piece.count(mark)
    return "".join(pieces), spans
