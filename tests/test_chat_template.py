"""Chat templates: rendered as transformers renders them, found where checkpoints keep them, and unable to do harm."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_tiny import TEMPLATES
from transformers.utils.chat_template_utils import render_jinja_template

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Where's\n the <cat>? "}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Über there."}]}
CHAT = [QUESTION, ANSWER, {"role": "user", "content": [{"type": "text", "text": "Thanks"}]}]

FEATURES = {
    "block newlines": "{% for m in messages %}\n  {% if true %}\n    {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}?{% break %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': '<é', 'a': 1} | tojson(sort_keys=true) }}",
    "operators": "{{ 'a' ~ 1 ~ [2, 'b'] ~ unknown }}{{ 'x' * 3 + 'y' }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 7 // 2 * 1.5 }}",
    "tools": "{{ tools is defined }}{{ tools is none }}{{ documents }}",
    "variables": "{{ bos_token + eos_token }}{{ add_generation_prompt }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) %}[{{ m }}{% generation %}!{% endgeneration %}]{% endmacro %}{{ turn('user') }}",
    "scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "media": "{{ messages[0].content[0] }}",
}  # fmt: skip


def theirs(template, messages, **variables):
    return render_jinja_template([messages], chat_template=template, **variables)[0][0]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_family_templates_render_as_in_transformers(template, prompt):
    for messages in (CHAT, CHAT[:2], CHAT[:1], CHAT[2:]):
        ours = ChatTemplate(template).render(messages, prompt, {"bos_token": "<s>"})
        assert ours == theirs(template, messages, add_generation_prompt=prompt, bos_token="<s>")


@pytest.mark.parametrize("template", FEATURES.values(), ids=FEATURES)
def test_language_features_render_as_in_transformers(template):
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [{**QUESTION, "content": [{"type": "image", "image": object()}]}, *CHAT[1:]]
    assert ChatTemplate(template).render(messages, True, variables) == theirs(
        template, messages, add_generation_prompt=True, **variables
    )


def test_without_block_trimming_the_text_differs():
    import jinja2

    plain = jinja2.Environment().from_string(FEATURES["block newlines"]).render(messages=CHAT)
    assert plain != theirs(FEATURES["block newlines"], CHAT)


def test_generation_tags_become_marks():
    text = ChatTemplate(TEMPLATES["llava"]).render(CHAT, answer_marks=("(", ")"))
    assert text.endswith("ASSISTANT: (Über there. )USER: Thanks ")
    assert ChatTemplate(FEATURES["macro"]).render(CHAT, answer_marks=("(", ")")) == "[user(!)]"


def test_strftime_now_is_read_when_rendering(monkeypatch):
    import minivlm.chat_template as module

    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")

    class Clock:
        @staticmethod
        def now():
            return module.datetime.fromisoformat("2024-07-26")

        fromisoformat = staticmethod(module.datetime.fromisoformat)

    monkeypatch.setattr(module, "datetime", Clock)
    assert template.render([]) == "26 Jul 2024"


# --- where it is found ------------------------------------------------------------------------------------------------


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_places_are_searched_in_order(tmp_path):
    with pytest.raises(MinivlmError, match="no chat template"):
        ChatTemplate.from_folder(tmp_path)
    assert ChatTemplate.from_folder(tmp_path, default="family").source == "family"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "several"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert ChatTemplate.from_folder(tmp_path).source == "several"
    write(tmp_path, "tokenizer_config.json", {"chat_template": "tokenizer"})
    assert ChatTemplate.from_folder(tmp_path).source == "tokenizer"
    write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert ChatTemplate.from_folder(tmp_path, default="family").source == "json"
    write(tmp_path, "chat_template.jinja", "jinja é")
    assert ChatTemplate.from_folder(tmp_path, default="family").source == "jinja é"


@pytest.mark.parametrize(
    "blind",
    [
        "{% for m in messages %}[INST] {{ m.content + ' [/INST]' }}{% endfor %}",  # fails on a list
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",  # prints the list as Python does
        "{% for m in messages %}{{ m.role }}{% endfor %}",
    ],
)
def test_a_language_models_template_gives_way_to_the_familys(tmp_path, blind):
    write(tmp_path, "tokenizer_config.json", {"chat_template": blind})
    assert ChatTemplate.from_folder(tmp_path, default=TEMPLATES["llava"]).source == TEMPLATES["llava"]
    write(tmp_path, "tokenizer_config.json", {"chat_template": TEMPLATES["mistral"]})
    assert ChatTemplate.from_folder(tmp_path, default=TEMPLATES["llava"]).source == TEMPLATES["mistral"]


@pytest.mark.parametrize(
    "name, content", [("chat_template.json", "{"), ("chat_template.json", "[1]"), ("tokenizer_config.json", "[" * 9999)]
)
def test_broken_files_are_named(tmp_path, name, content):
    write(tmp_path, name, content)
    with pytest.raises(MinivlmError, match=name):
        ChatTemplate.from_folder(tmp_path, default="family")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(MinivlmError, match="chat_template.jinja"):
        ChatTemplate.from_folder(tmp_path)


# --- harm -------------------------------------------------------------------------------------------------------------

BAD = {
    "{% if %}": "has an error",
    "{{ 'open": "has an error",
    "{% generation %}": "has an error",
    "{{ " + "(" * 9999 + " }}": "has an error",
    "{{ raise_exception('No\n tools!') }}": "No tools!",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe",
    "{% include '/etc/passwd' %}": "fails",
    "{{ nothing.at_all }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "division by zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "steps",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}": "characters",
    "{{ 'x' * 10 ** 12 }}": "characters",
    "{{ [1] * 10 ** 12 }}": "characters",
    "{{ 9 ** 99999999 }}": "characters",
    "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "characters",
    "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "characters",
}


@pytest.mark.parametrize("source, reason", BAD.items(), ids=[source[:40] for source in BAD])
def test_bad_templates_end_in_one_line(source, reason):
    with pytest.raises(MinivlmError, match=reason) as caught:
        ChatTemplate(source).render(CHAT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_objects_in_messages_stay_out_of_reach():
    class Picture:
        def save(self):
            raise AssertionError("a template called this")

    messages = [{"role": "user", "content": [{"type": "image", "image": Picture()}]}]
    assert ChatTemplate("{{ messages[0].content[0].image }}").render(messages) == "<Picture>"
    with pytest.raises(MinivlmError):
        ChatTemplate("{{ messages[0].content[0].image.save() }}").render(messages)


@given(st.sampled_from(sorted(TEMPLATES)), st.integers(0, 2000), st.text(min_size=1, max_size=3), st.booleans())
def test_a_damaged_template_renders_or_says_why(name, place, insert, replace):
    source = TEMPLATES[name]
    source = source[:place] + insert + source[place + replace :]
    try:
        text = ChatTemplate(source).render(CHAT, True, {"bos_token": "<s>"})
    except MinivlmError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(text, str)
