"""A checkpoint's Jinja chat template: messages in, prompt text out.

A template is a program that came with the weights, so it runs in Jinja's sandbox, sees only plain data, and cannot
loop, add up strings or write without end. Otherwise it runs as transformers runs it (`{% generation %}`, `{% break %}`,
`raise_exception`, `strftime_now`, `tojson`). Tokenising is text.py's work.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from minivlm.errors import MinivlmError
from minivlm.files import one_line, read_json, read_text

MAX_CHARACTERS = 10_000_000  # of a prompt, or of any string on the way; 128k tokens are about 500,000
MAX_LOOP_STEPS = 300_000  # per rendering, all loops together; a thousand messages take about 10,000


class ChatTemplate:
    """A compiled template; `source` is its text."""

    def __init__(self, source: str):
        """Raises MinivlmError where the template has a syntax error."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "join_": _join}
        self.source = source
        try:
            self._template = environment.from_string(_Limits().visit(environment.parse(source)))
        except Exception as error:  # Jinja's own, and what Python says to deep nesting and giant numbers
            raise MinivlmError(
                f"the chat template has an error ({one_line(error)}); mend it, or pass a rendered prompt"
            ) from error

    @classmethod
    def from_folder(cls, folder: str | Path, default: str | None = None) -> "ChatTemplate":
        """From chat_template.jinja, chat_template.json, processor_config.json or tokenizer_config.json; else `default`.

        The template in tokenizer_config.json is often the language model's, from before it could see: where it cannot
        take a list of parts, `default` is used instead.
        """
        folder = Path(folder)
        if (folder / "chat_template.jinja").is_file():
            return cls(read_text(folder / "chat_template.jinja"))
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            source = read_json(folder / name).get("chat_template")
            if isinstance(source, list):  # several templates with names
                named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
                source = named.get("default")
            if isinstance(source, str):
                template = cls(source)
                if name != "tokenizer_config.json" or default is None or template._takes_parts():
                    return template
        if default is None:
            raise MinivlmError(f"{folder} has no chat template; pass a rendered prompt (--raw) instead of messages")
        return cls(default)

    def _takes_parts(self) -> bool:
        try:
            text = self.render([{"role": "user", "content": [{"type": "text", "text": "probe"}]}])
        except MinivlmError:
            return False
        return "probe" in text and "'type'" not in text  # a list pasted as Python prints it

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        variables: dict | None = None,
        answer_marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The prompt. `answer_marks` are written where `{% generation %}` and `{% endgeneration %}` stand.

        Raises MinivlmError with the template's own sentence where it refuses the messages.
        """
        steps = iter(range(MAX_LOOP_STEPS))
        names = {"tools": None, "documents": None, **(variables or {}), "messages": messages}
        names |= {"add_generation_prompt": add_generation_prompt}
        chunks, length = [], 0
        try:
            for chunk in self._template.generate(
                _plain(names) | {"loop_step_": lambda: _next_step(steps), "answer_marks_": answer_marks}
            ):
                chunks.append(chunk)
                length = _checked_length(length + len(chunk))
        except jinja2.TemplateError as error:
            raise MinivlmError(f"the chat template refuses these messages: {one_line(error)}") from error
        except Exception as error:  # a template is a stranger's program and may raise anything
            raise MinivlmError(
                f"the chat template fails on these messages ({type(error).__name__}: {one_line(error)}); "
                "mend it, or pass a rendered prompt"
            ) from error
        return "".join(chunks)


def _plain(value: object) -> object:
    """Strings, numbers, lists and dicts only: a template gets no objects (a PIL image has a `save` method)."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else f"<{type(value).__name__}>"


# --- what a template may call -----------------------------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own filter would write HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: writes a mark before and after what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.Getitem(nodes.Name("answer_marks_", "load"), nodes.Const(side), "load")], lineno=line)
            for side in (0, 1)
        )
        return [start, nodes.Scope(body, lineno=line), end]


# --- limits -----------------------------------------------------------------------------------------------------------


class _Limits(NodeTransformer):
    """Makes every loop count its steps, and `~` watch its result."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self.generic_visit(node)
        step = nodes.Call(nodes.Name("loop_step_", "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        return nodes.Call(nodes.Name("join_", "load"), node.nodes, [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which `+`, `*` and `**` refuse to make giants."""

    intercepted_binops = frozenset(["+", "*", "**"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            _checked_length(len(str(left)) * abs(right))  # about the result's digits
        if operator == "*" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            _checked_length(len(left) * right if isinstance(right, int) else left * len(right))
        result = super().call_binop(context, operator, left, right)
        _checked_length(0 if isinstance(result, (int, float)) else len(result))
        return result


def _join(*parts: object) -> str:
    text = "".join(map(str, parts))
    _checked_length(len(text))
    return text


def _checked_length(length: int) -> int:
    if length > MAX_CHARACTERS:
        raise OverflowError(f"it writes more than {MAX_CHARACTERS} characters")
    return length


def _next_step(steps: Iterator[int]) -> str:
    if next(steps, None) is None:
        raise OverflowError(f"its loops take more than {MAX_LOOP_STEPS} steps")
    return ""
