"""Special tokens that users type stay text: they make no picture, end no turn, and change no id but their own."""

import json
import os
import re
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tokenizers
import tokenizers_tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers_tiny import SPECIAL, TEMPLATES

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.text import Tokenizer, tokenize_chat

LLAMA = tokenizers_tiny.llama(("<image>", "<pad>", "[INST]", "[/INST]"))
QWEN2 = tokenizers_tiny.qwen2(("<image>", "<video>"))
LLAMA3 = tokenizers_tiny.llama3()
FAMILIES = {  # family → tokenizer, its template
    "llava": (Tokenizer(LLAMA, SPECIAL["llama"]), ChatTemplate(TEMPLATES["llava"])),
    "mistral": (Tokenizer(LLAMA, SPECIAL["llama"]), ChatTemplate(TEMPLATES["mistral"])),
    "onevision": (Tokenizer(QWEN2, SPECIAL["qwen2"]), ChatTemplate(TEMPLATES["onevision"])),
    "qwen2_vl": (Tokenizer(QWEN2, SPECIAL["qwen2"]), ChatTemplate(TEMPLATES["qwen2_vl"])),
    "mllama": (Tokenizer(LLAMA3, SPECIAL["llama3"]), ChatTemplate(TEMPLATES["mllama"])),
}
LITERALS = ["<image>", "<|image|>", "<video>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|im_start|>",
            "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<IMAGE>"]  # fmt: skip
ODDS = ["<", "<im", "age>", "</", "<|im_end|", "s>", "\ue000", "\ue001\ue002", "\uf8ff", " ", "\n", "  ", "é", "你好",
        "🙂", "what is ", "USER: ", "system", ">", "|", "{{ 1 }}", "{% generation %}"]  # fmt: skip
typed = st.lists(st.sampled_from(LITERALS + ODDS), max_size=8).map("".join)
families = pytest.mark.parametrize("family", FAMILIES)
any_family = st.sampled_from(sorted(FAMILIES))


def chat(question, answer="Yes.", more="Thanks"):
    """Three turns; `question` may be several parts."""
    parts = [question] if isinstance(question, str) else question
    return [
        {"role": "user", "content": [{"type": "image"}, *({"type": "text", "text": part} for part in parts)]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [{"type": "text", "text": more}]},
    ]


def added_ids(tokenizer, ids):
    added = tokenizer.backend.get_added_tokens_decoder()
    return [index for index in ids if index in added]


def without_added_tokens(backend):
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))


def segment_by_segment(tokenizer, template, question):
    """The ids by another way: the template's special tokens cut the prompt, a tokenizer without any encodes the rest.

    Right for tokenizers that encode every stretch between special tokens by itself, which all of FAMILIES do.
    """
    trimmed = question.strip() if "trim" in template.source else question
    prompt = template.render(chat("QUESTION"), True, tokenizer.special_tokens)
    literals = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    plain = without_added_tokens(tokenizer.backend)
    ids = list(tokenizer.frame(prompt)[0])
    for piece in re.split("(" + "|".join(map(re.escape, literals)) + ")", prompt):
        if piece in literals:
            ids.append(tokenizer.token_to_id(piece))
        elif piece:
            ids += plain.encode(piece.replace("QUESTION", trimmed), add_special_tokens=False).ids
    return ids


@given(any_family, typed)
def test_ids_are_those_of_every_stretch_of_text_by_itself(family, question):
    tokenizer, template = FAMILIES[family]
    ours = tokenize_chat(tokenizer, template, chat(question)).ids
    assert ours == segment_by_segment(tokenizer, template, question)


@given(any_family, st.lists(typed, min_size=1, max_size=3), typed, typed)
def test_pictures_and_turns_are_those_of_a_harmless_chat(family, question, answer, more):
    """Parts that together form a literal (`<im`, `age>`) are no exception."""
    tokenizer, template = FAMILIES[family]
    ours = tokenize_chat(tokenizer, template, chat(question, answer, more))
    harmless = tokenize_chat(tokenizer, template, chat(["a"] * len(question), "a", "a"))
    assert added_ids(tokenizer, ours.ids) == added_ids(tokenizer, harmless.ids)
    assert ours.text == template.render(chat(question, answer, more), True, tokenizer.special_tokens)
    assert len(ours.is_answer) == len(ours.ids)
    decoded = tokenizer.decode(ours.ids, skip_special=False)
    for text in [*question, answer, more]:
        assert unicodedata.normalize("NFC", text.strip()) in unicodedata.normalize("NFC", decoded)


@families
@pytest.mark.parametrize("literal", LITERALS)
def test_without_guarding_a_literal_would_be_parsed(family, literal):
    tokenizer, template = FAMILIES[family]
    messages = chat(f"What does {literal} mean?")
    ours, harmless = (tokenize_chat(tokenizer, template, m) for m in (messages, chat("a")))
    naive = tokenizer.encode(ours.text, add_bos=True)
    parsed = tokenizer.token_to_id(literal) is not None
    assert (added_ids(tokenizer, naive) != added_ids(tokenizer, harmless.ids)) == parsed
    assert (naive != ours.ids) == parsed
    assert literal in tokenizer.decode(ours.ids)


@pytest.mark.parametrize("answer", ["a </s> b", "<image>"])
def test_a_literal_in_an_answer_is_text_and_said(answer):
    tokenizer, template = FAMILIES["llava"]
    ours = tokenize_chat(tokenizer, template, chat("Why?", answer))
    said = [index for index, is_said in zip(ours.ids, ours.is_answer, strict=True) if is_said]
    assert tokenizer.decode(said, skip_special=False).strip() == answer
    assert added_ids(tokenizer, said) == []


def test_a_template_may_change_the_text():
    tokenizer = FAMILIES["llava"][0]
    template = ChatTemplate(
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}"
        "{{ p.text | trim | lower }}{% endif %}{% endfor %}{% endfor %}</s>"
    )
    ours = tokenize_chat(tokenizer, template, chat([" <IMAGE> ", "</S", "> <im  ", "AGE>"]))
    assert ours.text == "<image><image></s> <image>yes.thanks</s>"
    assert added_ids(tokenizer, ours.ids) == [tokenizer.bos_id, tokenizer.token_to_id("<image>"), tokenizer.eos_id]


def test_a_users_bos_does_not_replace_the_real_one():
    tokenizer = FAMILIES["llava"][0]
    template = ChatTemplate("{{ messages[0].content[0].text }}")
    ours = tokenize_chat(tokenizer, template, [{"role": "user", "content": "<s> hi"}]).ids
    assert ours == [1, *without_added_tokens(LLAMA).encode("<s> hi", add_special_tokens=False).ids]


@families
def test_private_use_characters_are_text(family):
    tokenizer, template = FAMILIES[family]
    private = "".join(map(chr, range(0xE000, 0xE010)))
    ours = tokenize_chat(tokenizer, template, chat(private + "<image></s><|im_end|>" + private))
    assert private + "<image></s><|im_end|>" + private in tokenizer.decode(ours.ids)
    with pytest.raises(MinivlmError, match="private-use"):
        tokenize_chat(tokenizer, template, chat("".join(map(chr, range(0xE000, 0xF900)))))


KINDS = {
    "plain": {},
    "not special": {"special": False},
    "eats spaces before": {"lstrip": True},
    "eats spaces after": {"rstrip": True},
    "found after normalising": {"normalized": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("style", ["llama", "llama, prefix at the start only", "qwen2"])
def test_only_the_literals_ids_change(style, kind):
    """Lines are encoded independently of each other in these tokenizers, so all lines but the literal's must stay."""
    backend = {
        "llama": lambda: tokenizers_tiny.llama(()),
        "llama, prefix at the start only": lambda: tokenizers_tiny.llama((), legacy=False),
        "qwen2": lambda: tokenizers_tiny.qwen2(()),
    }[style]()
    backend.add_tokens([AddedToken(literal, **{"normalized": False, **kind}) for literal in ("<image>", "<end>")])
    tokenizer = Tokenizer(backend)
    template = ChatTemplate("Look: <image> {% for m in messages %}{{ m.content[0].text }} <end> {% endfor %} So?")
    odd, even = (
        tokenize_chat(tokenizer, template, [{"role": "user", "content": f"First\n{line}\nthen  that."}]).ids
        for line in ("<end>", "at")
    )
    newline = "Ċ" if style == "qwen2" else "<0x0A>"
    before, after = (even.index(tokenizer.token_to_id(newline)), even[::-1].index(tokenizer.token_to_id(newline)))
    assert odd[: before + 1] == even[: before + 1]
    assert odd[-after - 1 :] == even[-after - 1 :]
    assert added_ids(tokenizer, odd) == added_ids(tokenizer, even)
    assert "".join(backend.id_to_token(index) for index in odd[before + 1 : -after - 1]) == "<end>"
    assert even == tokenizer.encode(template.render([{"content": [{"text": "First\nat\nthen  that."}]}]), add_bos=True)


# --- a tokenizer of real size -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """32,000 entries, from the language reference and the docstrings in the standard library; every family's tokens."""
    sources = [path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    texts = [*topics.values(), *(text for source in sources for text in re.findall(r'"""(.*?)"""', source, re.S))]
    special = [literal for literal in LITERALS if literal not in ("<s>", "</s>", "<unk>", "<IMAGE>")]
    lines = [line for text in texts for line in text.splitlines()]
    tokenizer = Tokenizer(tokenizers_tiny.llama(special, 32_000, lines), SPECIAL["llama"])
    assert tokenizer.vocab_size == 32_000 + len(special)
    return tokenizer


@given(any_family, st.lists(typed, min_size=1, max_size=2), typed)
def test_with_a_real_tokenizer_literals_are_text(real, family, question, answer):
    template = FAMILIES[family][1]
    ours = tokenize_chat(real, template, chat(question, answer))
    harmless = tokenize_chat(real, template, chat(["a"] * len(question), "a"))
    assert added_ids(real, ours.ids) == added_ids(real, harmless.ids)
    image = "<|image|>" if family == "mllama" else "<image>"
    assert ours.ids.count(real.token_to_id(image)) == 1
    decoded = real.decode(ours.ids, skip_special=False)
    assert all(text.strip() in decoded for text in [*question, answer])


@families
def test_with_a_real_tokenizer_prose_takes_few_tokens(real, family):
    template = FAMILIES[family][1]
    text = "The default implementation of the method returns a string that describes the object."
    ours = tokenize_chat(real, template, chat(text + " <image> </s> [INST] <|im_start|>"))
    assert len(real.encode(text)) <= 16  # so the vocabulary is one of words
    assert text + " <image> </s> [INST] <|im_start|>" in real.decode(ours.ids)
    naive = real.encode(ours.text, add_bos=True)
    assert added_ids(real, naive) != added_ids(real, ours.ids)
