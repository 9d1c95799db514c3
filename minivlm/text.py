"""Text to token ids and back: tokenizer, chat template, and the safety between them.

`Tokenizer` wraps a checkpoint's tokenizer files, `ChatTemplate` its Jinja template, and `tokenize_chat` joins them: messages in, ids
out, with ONE placeholder id per picture (the model's processor multiplies them). What a user types is never parsed as a special
token: `<image>` or `</s>` inside a message is text, as it is on this page.

Ids equal transformers' for the same files. This file knows no model: which tokens mean what is read from the checkpoint.
"""

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken

from minivlm.errors import MinivlmError

MAX_RENDERED = 10_000_000  # characters; a prompt that fills a 128k context has about 500,000
MAX_LOOP_STEPS = 1_000_000  # per rendering, all loops together: about a second
PRIVATE_USE = range(0xE000, 0xF900)  # Unicode's private-use characters: no tokenizer rule and no template filter touches them


def read_json(path: Path) -> dict:
    """A JSON object from a file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise MinivlmError(f"{path} is not readable as JSON ({_one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise MinivlmError(f"{path} holds a {type(content).__name__} where a JSON object is expected; download it again")
    return content


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


class Tokenizer:
    """Token ids from text and text from token ids, as the checkpoint's own files define them."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict | None = None):
        """`backend`: a `tokenizers.Tokenizer`; `config`: what stands in tokenizer_config.json."""
        config = config or {}
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self._add_declared_tokens(config.get("added_tokens_decoder") or {})
        self.special_tokens = {  # name → literal, under the names that chat templates use: bos_token, eos_token, ...
            key: _literal(value) for key, value in config.items() if key.endswith("_token") and _literal(value) is not None
        }
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.pad_token = self.special_tokens.get("pad_token")
        for key in ("bos_token", "eos_token"):
            token = self.special_tokens.get(key)
            if token is not None and backend.token_to_id(token) is None:
                raise MinivlmError(f"tokenizer_config.json names {token!r} as its {key}, which the tokenizer does not have; "
                                   "the two files are of different checkpoints")
        if self.pad_token is None or backend.token_to_id(self.pad_token) is None:
            self.pad_token = self.eos_token  # padding is masked, so any token of the vocabulary will do
        self._prefix, self._suffix = self._framing(config)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and added_tokens.json."""
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        for key, value in read_json(folder / "special_tokens_map.json").items():
            if config.get(key) is None:
                config[key] = value
        if not config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {
                index: {"content": token} for token, index in read_json(folder / "added_tokens.json").items()}
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise MinivlmError(f"{folder} has no tokenizer.json; download it from the checkpoint's repository")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception
            raise MinivlmError(f"{path} is not a usable tokenizer ({_one_line(error)}); download it again") from error
        return cls(backend, config)

    def _add_declared_tokens(self, declared: dict) -> None:
        """Tokens that tokenizer_config.json declares and tokenizer.json lacks, at the ids that it gives them."""
        known = self.backend.get_added_tokens_decoder()
        for index, entry in sorted(((int(index), entry) for index, entry in declared.items()), key=lambda pair: pair[0]):
            if index in known and known[index].content == entry["content"]:
                continue
            flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
            self.backend.add_tokens([AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags)])
            if self.backend.token_to_id(entry["content"]) != index:
                raise MinivlmError(f"tokenizer_config.json puts {entry['content']!r} at id {index}, tokenizer.json at "
                                   f"{self.backend.token_to_id(entry['content'])}; the two files are of different checkpoints")

    def _framing(self, config: dict) -> tuple[list[int], list[int]]:
        """Ids that go before and after every text: add_bos_token / add_eos_token where given, else tokenizer.json's own rule."""
        if "add_bos_token" in config or "add_eos_token" in config:
            return ([self.bos_id] if config.get("add_bos_token") and self.bos_token else [],
                    [self.token_to_id(self.eos_token)] if config.get("add_eos_token") and self.eos_token else [])
        plain, framed = (self.backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        start = next(i for i in range(len(framed)) if framed[i:i + len(plain)] == plain)
        return framed[:start], framed[start + len(plain):]

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (a model's embedding may have more rows)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return self.token_to_id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self.token_to_id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """Id that fills batches on the left: pad_token, or eos_token where the checkpoint has none."""
        return self.token_to_id(self.pad_token)

    def token_to_id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of an already rendered prompt: special tokens in `text` ARE parsed.

        `add_bos`: add what the tokenizer puts around a text (BOS for Llama, nothing for Qwen) unless the text starts with BOS.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return self._framed(ids, text) if add_bos else ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder that takes ids one by one."""
        return TextStream(self.backend, skip_special)

    def _framed(self, ids: list[int], text: str) -> list[int]:
        if self.bos_token is not None and text.startswith(self.bos_token):
            return ids
        return self._prefix + ids + self._suffix

    # ---- literals of added tokens that a user typed -------------------------------------------------------------------------

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _literals(self) -> list[str]:
        """Added tokens that a user's text must not form. Runs of spaces and single characters are ordinary writing."""
        return [token.content for token in self._added.values() if len(token.content.strip()) > 1]

    @cached_property
    def _literal_starts(self) -> re.Pattern:
        """Matches (without consuming) where a literal begins, in any case: a template may call `upper` or `lower`."""
        return re.compile("(?=" + "|".join(map(re.escape, self._literals or ["(?!)"])) + ")", re.IGNORECASE)

    @cached_property
    def _literal_prefixes(self) -> set[str]:
        return {literal[:end].lower() for literal in self._literals for end in range(1, len(literal))}

    def guard(self, text: str, mark: str) -> str:
        """`text` with `mark` put after the first character of every literal, so that none is found in it any more.

        A beginning of a literal at the end of the text is broken up, too: the next part may bring the rest.
        """
        starts = {match.start() for match in self._literal_starts.finditer(text)} if self._literals else set()
        ending = text.rstrip().lower()
        longest = max(map(len, self._literals), default=0)
        starts |= {i for i in range(max(0, len(ending) - longest), len(ending)) if ending[i:] in self._literal_prefixes}
        pieces = [0, *sorted(start + 1 for start in starts), len(text)]
        return mark.join(text[a:b] for a, b in zip(pieces, pieces[1:], strict=False))

    def encode_guarded(self, text: str, mark: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and spans (start, end) in the text without marks, of a rendered text in which `mark` breaks up users' literals.

        Equal to encoding the text without marks, unless that would parse a user's literal. Then the same text is encoded by a
        tokenizer that knows no added token except a stand-in for those that the template wrote.
        """
        clean = text.replace(mark, "")
        encoding = self.backend.encode(clean, add_special_tokens=False)
        if mark not in text:
            return encoding.ids, encoding.offsets
        true = [(index, start - text.count(mark, 0, start), end - text.count(mark, 0, end))
                for index, start, end in self._occurrences(text, self.backend.encode(text, add_special_tokens=False))]
        if true == self._occurrences(clean, encoding):
            return encoding.ids, encoding.offsets
        return self._encode_with_stand_ins(clean, true)

    def _occurrences(self, text: str, encoding: tokenizers.Encoding) -> list[tuple[int, int, int]]:
        """(id, start, end) of every added token that was parsed; an unknown character may have <unk>'s id, hence the look."""
        return [(index, start, end) for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if index in self._added and self._added[index].content in text[start:end]]

    def _encode_with_stand_ins(self, text: str, true: list[tuple[int, int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        stand_in = _unused_characters([text], 1)[0] * 2
        pieces, shifts, end_of_last = [], [], 0
        for index, start, end in true:
            content = self._added[index].content
            at = text.index(content, start, end)  # an lstrip or rstrip token's span takes in the spaces around it
            pieces += [text[end_of_last:at], stand_in]
            end_of_last = at + len(content)
            shifts.append((sum(map(len, pieces)), end_of_last))
        encoding = self._plain_backend(stand_in).encode("".join(pieces) + text[end_of_last:], add_special_tokens=False)
        stand_in_id, replaced = self._plain_backend(stand_in).token_to_id(stand_in), iter(true)
        ids, spans, shift = [], [], 0
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index == stand_in_id:
                index, *span = next(replaced)
                after_ours, after_theirs = shifts.pop(0)
                shift = after_theirs - after_ours
                spans.append(tuple(span))
            else:
                spans.append((start + shift, end + shift))
            ids.append(index)
        return ids, spans

    def _plain_backend(self, stand_in: str) -> tokenizers.Tokenizer:
        """The tokenizer without added tokens, except `stand_in`; made at the first literal that a user types."""
        if self._plain is None or self._plain[0] != stand_in:
            description = json.loads(self.backend.to_str()) | {"added_tokens": [], "post_processor": None}
            plain = tokenizers.Tokenizer.from_str(json.dumps(description))
            plain.add_tokens([AddedToken(stand_in, normalized=False)])
            self._plain = (stand_in, plain)
        return self._plain[1]

    _plain: tuple[str, tokenizers.Tokenizer] | None = None


def _literal(value: object) -> str | None:
    """The literal of a special token, which configs write as a string or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _unused_characters(texts: list[str], count: int) -> list[str]:
    """Private-use characters that occur in none of `texts`."""
    used = set().union(*texts)
    free = [chr(code) for code in PRIVATE_USE if chr(code) not in used][:count]
    if len(free) < count:
        raise MinivlmError("the messages use every private-use character of Unicode; leave some out")
    return free


class TextStream:
    """Ids one by one to text, piece by piece: never half a character, and together exactly what `decode` gives.

    A byte-level tokenizer's pieces are bytes, which an incremental UTF-8 decoder joins. In a SentencePiece-like one only tokens
    such as <0xE4> are bytes; a run of them is held back until it ends, because its text depends on the whole run.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool = True):
        self._backend, self._skip = backend, skip_special
        self._special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if "ByteLevel" in str(backend.decoder) else None
        self._context = backend.encode("a", add_special_tokens=False).ids  # stands for all earlier text: decoders strip the first space
        self._context_text = backend.decode(self._context)
        self._pending: list[int] = []
        self._started = False

    def push(self, index: int) -> str:
        """The text that became certain with this id; may be empty."""
        if self._skip and index in self._special:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(_token_bytes(self._backend.id_to_token(index)))
        self._pending.append(index)
        return "" if _BYTE_TOKEN.fullmatch(self._backend.id_to_token(index) or "") else self._flush()

    def end(self) -> str:
        """The rest, with � for bytes that are no character."""
        return self._utf8.decode(b"", final=True) if self._utf8 is not None else self._flush()

    def _flush(self) -> str:
        if not self._pending:
            return ""
        if self._started:
            text = self._backend.decode(self._context + self._pending, skip_special_tokens=False)[len(self._context_text):]
        else:
            text = self._backend.decode(self._pending, skip_special_tokens=False)
        self._pending, self._started = [], True
        return text


_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Byte-level BPE writes each byte as a visible character: printable Latin-1 as itself, the other 68 bytes as U+0100 ... U+0143.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in _VISIBLE)}


def _token_bytes(token: str | None) -> bytes:
    """A byte-level token's bytes; an added token with other characters stands for itself."""
    if token is None:
        return b""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode("utf-8")


# ---- chat templates -----------------------------------------------------------------------------------------------------------


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: writes a mark before and after what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in ("answer_start_", "answer_end_")]
        return [marks[0], nodes.Scope(body).set_lineno(line), marks[1]]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits: loops count their steps, and `*` and `**` refuse to make giants."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        sizes = [len(side) if isinstance(side, (str, list, tuple)) else side for side in (left, right)]
        if all(isinstance(size, int) for size in sizes):
            big = sizes[0] * sizes[1] if operator == "*" else max(abs(sizes[0]), 2).bit_length() * sizes[1]
            if big > MAX_RENDERED and not (operator == "*" and sizes == [left, right]):
                raise OverflowError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A checkpoint's Jinja chat template, run in a sandbox as transformers runs it."""

    def __init__(self, source: str):
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": datetime.now().strftime}
        self.source = source
        try:
            tree = environment.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.Name("loop_step_", "load"), [], [], None, None)))
            self._template = environment.from_string(nodes.Template(tree.body, lineno=1).set_environment(environment))
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise MinivlmError(f"the chat template cannot be read ({_one_line(error)}); pass another, or a rendered prompt") from error

    @classmethod
    def from_folder(cls, folder: str | Path, default: str | None = None) -> "ChatTemplate":
        """chat_template.jinja, chat_template.json, processor_config.json or tokenizer_config.json; else `default`."""
        folder = Path(folder)
        if (folder / "chat_template.jinja").is_file():
            return cls((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            source = read_json(folder / name).get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
            if isinstance(source, str):
                return cls(source)
        if default is None:
            raise MinivlmError(f"{folder} has no chat template; pass a rendered prompt (--raw) instead of messages")
        return cls(default)

    def render(self, messages: list[dict], add_generation_prompt: bool = False, variables: dict | None = None,
               answer_marks: tuple[str, str] = ("", "")) -> str:
        """The prompt as text. `answer_marks` are written where `{% generation %}` and `{% endgeneration %}` stand."""
        steps = iter(range(MAX_LOOP_STEPS))

        def loop_step() -> str:
            if next(steps, None) is None:
                raise OverflowError("its loops do not end")
            return ""

        chunks, length = [], 0
        try:
            for chunk in self._template.generate(
                    messages=_plain(messages), add_generation_prompt=add_generation_prompt, loop_step_=loop_step,
                    answer_start_=answer_marks[0], answer_end_=answer_marks[1], **{"tools": None, "documents": None, **(variables or {})}):
                chunks.append(chunk)
                length += len(chunk)
                if length > MAX_RENDERED:
                    raise OverflowError("its output does not end")
        except Exception as error:  # a template is a stranger's program and may raise anything
            raise MinivlmError(f"the chat template refuses these messages: {_one_line(error)}") from error
        return "".join(chunks)


def _plain(value: object) -> object:
    """Strings, numbers, lists and dicts only: a template gets no object (a PIL image has a `save` method)."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else f"<{type(value).__name__}>"


# ---- messages → ids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedChat:
    """`ids`, one placeholder per picture or film; `is_answer`, per id, or None unless asked for; `text`, the rendered prompt."""

    ids: list[int]
    is_answer: list[bool] | None
    text: str


def tokenize_chat(tokenizer: Tokenizer, template: ChatTemplate, messages: list[dict], add_generation_prompt: bool = True,
                  kwargs: dict | None = None, answers: bool = False) -> TokenizedChat:
    """Render and encode messages; what users typed stays text, BOS is added unless the template wrote it.

    `kwargs`: further template variables; `answers`: also find out which ids an assistant said (for training).
    """
    messages = [message | {"content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str) else message for message in _plain(messages)]
    texts: list[str] = [template.source]
    _map_texts(messages, lambda text: texts.append(text) or text)
    mark, *answer_marks = _unused_characters(texts, 3)
    guarded = _map_texts(messages, lambda text: tokenizer.guard(text, mark))

    def render(messages: list[dict], add_generation_prompt: bool) -> str:
        return template.render(messages, add_generation_prompt, tokenizer.special_tokens | (kwargs or {}), answer_marks)

    text = render(guarded, add_generation_prompt)
    if answers and answer_marks[0] not in text:
        text = _mark_answers(text, guarded, render, answer_marks)
    spans, text = _take_marks(text, mark, answer_marks)
    ids, offsets = tokenizer.encode_guarded(text, mark)
    # A token that reaches beyond an answer (its last space and the next turn's bracket, say) is not of the answer.
    is_answer = [any(a < end <= b for a, b in spans) for _, end in offsets] if answers else None
    text = text.replace(mark, "")
    framed = tokenizer._framed(ids, text)
    if is_answer is not None and len(framed) > len(ids):
        is_answer = [False] * len(tokenizer._prefix) + is_answer + [False] * len(tokenizer._suffix)
    return TokenizedChat(framed, is_answer, text)


def _map_texts(value: object, function: Callable[[str], str], key: str = "") -> object:
    """A copy of messages with `function` applied to every string but roles and types, which are structure."""
    if isinstance(value, dict):
        return {key: _map_texts(item, function, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, function, key) for item in value]
    return function(value) if isinstance(value, str) and key not in ("role", "type") else value


def _mark_answers(text: str, messages: list[dict], render: Callable[[list[dict], bool], str], marks: list[str]) -> str:
    """Put marks around the answers in a rendered text whose template has no `{% generation %}`.

    An answer is what a rendering up to and with it has more than the rendering up to it that asks for it.
    """
    cursor, pieces = 0, []
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, asked, after = render(messages[:turn], False), render(messages[:turn], True), render(messages[:turn + 1], False)
        if not after.startswith(asked):  # some templates put nothing, or something else, before an answer that is known
            asked = before
        found = len(before) if text.startswith(after) else text.find(after[len(before):], cursor)
        if found < 0 or not after.startswith(before):
            raise MinivlmError("cannot tell which part of the prompt the assistant says: this chat template writes earlier turns "
                               "differently later; use one with {% generation %} tags")
        start, end = found + len(asked) - len(before), found + len(after) - len(before)
        pieces += [text[cursor:start], marks[0], text[start:end], marks[1]]
        cursor = end
    return "".join(pieces) + text[cursor:]


def _take_marks(text: str, mark: str, answer_marks: list[str]) -> tuple[list[tuple[int, int]], str]:
    """Spans (start, end) between the answer marks, counted without any marks, and the text with `mark` alone left in it."""
    spans, position, start = [], 0, 0
    for piece in re.split("([" + "".join(answer_marks) + "])", text):
        if piece == answer_marks[0]:
            start = position
        elif piece == answer_marks[1]:
            spans.append((start, position))
        else:
            position += len(piece) - piece.count(mark)
    return spans, re.sub("[" + "".join(answer_marks) + "]", "", text)
