"""Tokenizer files and conversations → ids: the ids of transformers. What users type is in test_text_literals.py."""

import json

import pytest
import tokenizers_tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers_tiny import SPECIAL, TEMPLATES
from transformers import AutoTokenizer

from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.text import Tokenizer, tokenize_chat

FAMILIES = {  # family → style of its tokenizer, added tokens, image token
    "llava": ("llama", ("<image>", "<pad>"), "<image>"),
    "mistral": ("llama", ("<image>", "<pad>"), "<image>"),
    "onevision": ("qwen2", ("<image>", "<video>"), "<image>"),
    "qwen2_vl": ("qwen2", ("<image>",), "<image>"),
    "mllama": ("llama3", ("<|image|>",), "<|image|>"),
}
families = pytest.mark.parametrize("family", FAMILIES)
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Where's\n the  cat? 你好 🙂"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Über there."}]}
THANKS = {"role": "user", "content": [{"type": "text", "text": "Thanks\n"}]}
CHAT = [QUESTION, ANSWER, THANKS]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with tokenizer and template per family."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        family: tokenizers_tiny.save(
            getattr(tokenizers_tiny, style)(added), root / family, style, TEMPLATES[family]
        )
        for family, (style, added, _) in FAMILIES.items()
    }  # fmt: skip


@pytest.fixture(scope="session")
def loaded(folders):
    """family → (our tokenizer, our template, their tokenizer)"""
    return {
        family: (Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), AutoTokenizer.from_pretrained(folder))
        for family, folder in folders.items()
    }


def reference(theirs, template, messages, prompt=True, **kwargs):
    """Ids as a processor of transformers makes them: BOS by the tokenizer unless the template wrote it."""
    text = theirs.apply_chat_template(
        messages, chat_template=template.source, add_generation_prompt=prompt, tokenize=False, **kwargs
    )
    written = theirs.bos_token is not None and text.startswith(theirs.bos_token)
    return theirs(text, add_special_tokens=not written)["input_ids"], text


# --- ids of transformers ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_ids_equal_transformers(loaded, family, turns, prompt):
    tokenizer, template, theirs = loaded[family]
    ours = tokenize_chat(tokenizer, template, CHAT[:turns], prompt)
    assert (ours.ids, ours.text) == reference(theirs, template, CHAT[:turns], prompt)
    assert ours.ids.count(tokenizer.token_to_id(FAMILIES[family][2])) == 1


@given(st.sampled_from(sorted(FAMILIES)), st.text(max_size=30), st.text(max_size=10))
def test_ids_equal_transformers_for_any_text(loaded, family, question, answer):
    tokenizer, template, theirs = loaded[family]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        THANKS,
    ]
    assert tokenize_chat(tokenizer, template, messages).ids == reference(theirs, template, messages)[0]


@families
def test_strings_count_as_text_parts(loaded, family):
    tokenizer, template, theirs = loaded[family]
    strings = [{"role": "user", "content": "Thanks\n"}]
    assert tokenize_chat(tokenizer, template, strings).ids == reference(theirs, template, [THANKS])[0]
    if family in ("llava", "onevision"):  # the trap: these templates drop a string without a word
        assert "Thanks" not in template.render(strings)


def test_template_variables_pass_through(loaded):
    tokenizer, template, theirs = loaded["qwen2_vl"]
    ours = tokenize_chat(tokenizer, template, CHAT, kwargs={"add_vision_id": True})
    assert ours.ids == reference(theirs, template, CHAT, add_vision_id=True)[0]
    assert ours.ids != tokenize_chat(tokenizer, template, CHAT).ids


@families
def test_bos_is_never_doubled(loaded, family):
    tokenizer, template, theirs = loaded[family]
    assert tokenize_chat(tokenizer, template, CHAT).ids.count(tokenizer.bos_id) == (tokenizer.bos_token is not None)
    text = "What is this?"
    assert tokenizer.encode(text, add_bos=True) == theirs(text)["input_ids"]
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token is not None:
        assert tokenizer.encode(text, add_bos=True) != tokenizer.encode(text)
        text = tokenizer.bos_token + text
        assert tokenizer.encode(text, add_bos=True) == tokenizer.encode(text)


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("style", SPECIAL)
def test_tokenizer_json_overrules_the_flags_of_the_config(tmp_path, style, flags):
    tokenizers_tiny.save(getattr(tokenizers_tiny, style)(), tmp_path, style, **flags)
    ours = Tokenizer.from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("What is this?", add_bos=True) == theirs("What is this?")["input_ids"]
    without = tokenizers_tiny.llama()
    without.post_processor = None
    ours = Tokenizer(without, SPECIAL["llama"] | flags)
    assert (ours.encode("a", add_bos=True)[0] == ours.bos_id) == flags["add_bos_token"]
    assert (ours.encode("a", add_bos=True)[-1] == ours.eos_id) == flags["add_bos_token"]


@families
def test_decoding_equals_transformers(loaded, family):
    tokenizer, template, theirs = loaded[family]
    ids = tokenize_chat(tokenizer, template, CHAT).ids
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.end() == tokenizer.decode(ids)


# --- which ids the assistant says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["onevision"])
def test_answers_equal_transformers(loaded, family):
    tokenizer, template, theirs = loaded[family]
    messages = CHAT + [ANSWER]
    ours = tokenize_chat(tokenizer, template, messages, add_generation_prompt=False)
    mask = theirs.apply_chat_template(
        messages, chat_template=template.source, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours.ids == mask["input_ids"]
    assert ours.is_answer == [bool(value) for value in mask["assistant_masks"]]
    assert any(ours.is_answer)


SAID = {  # what two answers are, with the template's own end of turn
    "llava": ["Über there. ", "Über there. "],
    "mistral": ["Über there.<\\s> ", "Über there.<\\s> "],
    "onevision": ["\nÜber there.", "\nÜber there."],
    "qwen2_vl": ["Über there.<|im_end|>\n", "Über there.<|im_end|>\n"],
    "mllama": ["Über there.<|eot_id|>", "Über there.<|eot_id|>"],
}


def said(tokenizer, chat):
    """Texts of the runs of answer ids."""
    runs, last = [], False
    for index, answer in zip(chat.ids, chat.is_answer, strict=True):
        if answer:
            runs = runs if last else [*runs, []]
            runs[-1].append(index)
        last = answer
    return [tokenizer.decode(run, skip_special=False) for run in runs]


@families
def test_answers_are_found_with_and_without_generation_tags(loaded, family):
    tokenizer, template, _ = loaded[family]
    messages = CHAT + [ANSWER]
    assert said(tokenizer, tokenize_chat(tokenizer, template, messages, add_generation_prompt=False)) == SAID[family]
    bare = ChatTemplate(template.source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    ours = said(tokenizer, tokenize_chat(tokenizer, bare, messages, add_generation_prompt=False))
    ends = {"llava": "", "onevision": "<|im_end|>"}.get(family, "")  # without tags, the end of the turn counts as said
    assert [text.strip() for text in ours] == [text.strip() + ends for text in SAID[family]]
    assert not any(tokenize_chat(tokenizer, bare, messages, answers=False).is_answer)


def test_answers_are_found_where_earlier_turns_change(loaded):
    """mllama writes a system turn only while there is no picture, so no beginning of this chat is rendered alike."""
    tokenizer, template, _ = loaded["mllama"]
    messages = [THANKS, ANSWER, QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "user"}]}]
    chat = tokenize_chat(tokenizer, template, messages)
    assert not chat.text.startswith(template.render(messages[:2], False, {"bos_token": tokenizer.bos_token}))
    assert said(tokenizer, chat) == ["Über there.<|eot_id|>", "user<|eot_id|>"]


def test_a_token_that_reaches_into_the_next_turn_is_not_said(loaded):
    tokenizer = loaded["llava"][0]
    template = ChatTemplate("{% for m in messages %}{% generation %}yes {% endgeneration %}the{% endfor %}")
    assert "▁the" in tokenizer.backend.encode("yes the").tokens
    assert said(tokenizer, tokenize_chat(tokenizer, template, [ANSWER])) == ["yes"]


def test_an_eos_after_the_last_turn_alone_is_not_missed(loaded):
    tokenizer = loaded["llava"][0]
    template = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% else %}</s>{% endif %}"
    )
    chat = tokenize_chat(tokenizer, template, [THANKS, ANSWER, THANKS, ANSWER], add_generation_prompt=False)
    assert said(tokenizer, chat) == ["Über there.", "Über there.</s>"]


def test_answers_that_cannot_be_found_are_refused(loaded):
    tokenizer = loaded["llava"][0]
    template = ChatTemplate("{{ messages | length }}{% for m in messages %}{{ loop.revindex }}{{ m.role }}{% endfor %}")
    with pytest.raises(MinivlmError, match="generation"):
        tokenize_chat(tokenizer, template, CHAT)
    assert tokenize_chat(tokenizer, template, CHAT, answers=False).text == "33user2assistant1user"


# --- files ------------------------------------------------------------------------------------------------------------


def config_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def rewrite(folder, name, content):
    (folder / name).write_text(json.dumps(content) if not isinstance(content, str) else content)


@pytest.fixture
def folder(tmp_path):
    return tokenizers_tiny.save(tokenizers_tiny.llama(), tmp_path, "llama", TEMPLATES["llava"])


def test_special_tokens_are_read_as_strings_and_as_objects(folder):
    config = config_of(folder)
    config["bos_token"] = {"content": "<s>", "lstrip": False}
    rewrite(folder, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", 2)
    assert tokenizer.pad_id == tokenizer.token_to_id("<pad>") == tokenizer.vocab_size - 1


def test_special_tokens_map_fills_what_the_config_leaves_out(folder):
    config = config_of(folder)
    for key in ("bos_token", "eos_token", "pad_token"):
        config[key] = None
    rewrite(folder, "tokenizer_config.json", config)
    assert Tokenizer.from_folder(folder).eos_token == "</s>"
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(folder).eos_token is None


def test_without_a_pad_token_eos_pads(folder):
    config = config_of(folder)
    (folder / "special_tokens_map.json").unlink()
    for pad in (None, "<not there>"):
        rewrite(folder, "tokenizer_config.json", {**config, "pad_token": pad})
        assert Tokenizer.from_folder(folder).pad_id == 2
    rewrite(folder, "tokenizer_config.json", {})
    assert Tokenizer.from_folder(folder).pad_id == 0


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_only_the_config_declares_are_added(tmp_path, place):
    backend = tokenizers_tiny.llama(added=())
    folder = tokenizers_tiny.save(backend, tmp_path, "llama", pad_token=None)
    config = config_of(folder)
    image = backend.get_vocab_size()
    if place == "added_tokens.json":
        del config["added_tokens_decoder"]
        rewrite(folder, "added_tokens.json", {"<image>": image})
    else:
        config["added_tokens_decoder"][str(image)] = {"content": "<image>", "special": True, "normalized": False}
    rewrite(folder, "tokenizer_config.json", config)
    text = "a <image> b"
    ours = Tokenizer.from_folder(folder).encode(text, add_bos=True)
    assert image in ours
    if place == "added_tokens_decoder":
        assert ours == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_extra_tokens_are_appended_once(folder):
    plain, extended = Tokenizer.from_folder(folder), Tokenizer.from_folder(folder, extra_tokens=["<image>", "<video>"])
    assert extended.vocab_size == plain.vocab_size + 1 == extended.token_to_id("<video>") + 1
    assert extended.token_to_id("<image>") == plain.token_to_id("<image>")


def broken_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    rewrite(folder, "tokenizer.json", text[: len(text) // 2])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def foreign_config(folder):
    rewrite(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>"})


def foreign_ids(folder):
    rewrite(folder, "tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<new>"}}})


def malformed_ids(folder):
    rewrite(folder, "tokenizer_config.json", {"added_tokens_decoder": {"seven": {"content": "<new>"}}})


def malformed_config(folder):
    rewrite(folder, "tokenizer_config.json", {"added_tokens_decoder": 3})


def truncated_config(folder):
    rewrite(folder, "tokenizer_config.json", '{"eos_token": ')


@pytest.mark.parametrize(
    "damage",
    [
        broken_tokenizer, no_tokenizer, foreign_config, foreign_ids, malformed_ids, malformed_config, truncated_config
    ],
)  # fmt: skip
def test_damaged_files_end_in_one_line(folder, damage):
    damage(folder)
    with pytest.raises(MinivlmError, match="tokenizer") as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]),
    place=st.floats(0, 1), insert=st.binary(max_size=3), cut=st.integers(0, 3),
)  # fmt: skip
def test_damaged_bytes_load_or_end_in_one_line(tmp_path_factory, name, place, insert, cut):
    folder = tmp_path_factory.mktemp("damaged")
    backend = tokenizers_tiny.llama()
    backend.add_tokens([AddedToken("<end>", normalized=False)])
    data = bytearray((tokenizers_tiny.save(backend, folder, "llama") / name).read_bytes())
    start = int(place * len(data))
    data[start : start + cut] = insert
    (folder / name).write_bytes(data)
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except MinivlmError as error:
        assert "\n" not in str(error)
    else:
        tokenizer.encode("What is this?", add_bos=True)
