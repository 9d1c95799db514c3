"""Messages to rows, rows to batches."""

import pytest
import torch
from PIL import Image
from tokenizers_tiny import qwen2

from minivlm.chat_template import ChatTemplate
from minivlm.conversation import IGNORED, Row, collate, expand, read, split_media
from minivlm.errors import MinivlmError
from minivlm.inputs import Prompt
from minivlm.text import Tokenizer

RED, BLUE = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (5, 2), "blue")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% elif p.type == 'text' %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ p.text }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ p.text }}{% endif %}"
    "{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(qwen2(("<image>",)), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def ask(*parts, role="user"):
    return {"role": role, "content": list(parts)}


def test_string_content_becomes_a_text_part():
    messages, images, videos = split_media([{"role": "user", "content": "Hello"}])
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert images == videos == []


def test_media_are_found_under_every_spelling():
    part = ask(
        {"type": "image", "image": RED},
        {"type": "image", "url": "http://a/b.png"},
        {"type": "image", "path": "c.png", "min_pixels": 9},
        {"type": "image_url", "image_url": {"url": "data:,x", "detail": "high"}},
        {"type": "image_url", "image_url": "d.png"},
        {"type": "video", "video": "e.mp4", "fps": 2},
    )
    messages, images, videos = split_media([part])
    assert [source for source, _ in images] == [RED, "http://a/b.png", "c.png", "data:,x", "d.png"]
    assert [options for _, options in images] == [{}, {}, {"min_pixels": 9}, {}, {}]
    assert videos == [("e.mp4", {"fps": 2})]
    assert [p["type"] for p in messages[0]["content"]] == ["image"] * 5 + ["video"]


@pytest.mark.parametrize(
    "messages, told",
    [
        ("hello", "must be a list"),
        ([{"role": "user"}], "needs a role and a content"),
        ([{"role": "user", "content": 7}], "string or a list of parts"),
        ([ask({"type": "sound", "sound": "x"})], "'sound'"),
        ([ask({"type": "image"})], "names no file"),
        ([ask({"type": "text", "text": "a\ud800"})], "no valid Unicode"),
    ],
)
def test_messages_of_another_form_are_refused(messages, told):
    with pytest.raises(MinivlmError, match=told):
        split_media(messages)


def test_read_marks_what_the_assistant_said(tokenizer):
    question = ask({"type": "image", "image": RED}, {"type": "text", "text": "Colour?"})
    talk = [question, ask({"type": "text", "text": "red"}, role="assistant")]
    row = read(talk, tokenizer, ChatTemplate(TEMPLATE), add_generation_prompt=False, answers=True)
    said = [token for token, answer in zip(row.ids, row.is_answer, strict=True) if answer]
    assert tokenizer.decode(said, skip_special=False) == "red<|im_end|>"
    assert [picture.size for picture in row.pictures] == [(4, 3)]


def test_a_prompt_is_read_as_it_is(tokenizer):
    row = read(Prompt("a<image>b", images=[BLUE]), tokenizer, ChatTemplate(TEMPLATE))
    assert row.ids.count(tokenizer.token_to_id("<image>")) == 1
    assert row.text == "a<image>b" and row.pictures[0].size == (5, 2)


def test_expand_repeats_placeholders_in_order():
    row = Row("", [1, 9, 2, 9], [False, True, True, False])
    expand(row, {9: [2, 3]})
    assert row.ids == [1, 9, 9, 2, 9, 9, 9]
    assert row.is_answer == [False, False, False, True, False, False, False], "a placeholder is never a target"


@pytest.mark.parametrize("counts", [[4], [4, 4, 4]])
def test_expand_wants_one_placeholder_per_picture(counts):
    with pytest.raises(MinivlmError, match=f"2 placeholders for pictures, but {len(counts)} were given"):
        expand(Row("", [9, 9], [False, False]), {9: counts})


def test_collate_pads_on_the_left():
    rows = [Row("", [5, 6, 7], [False, True, True]), Row("", [8], [True])]
    inputs = collate(rows, pad_id=0, labels=True)
    assert inputs.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs.labels.tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, 8]]
    assert collate(rows, pad_id=0).labels is None
    assert inputs.input_ids.dtype == torch.int64


def test_an_empty_prompt_is_refused():
    with pytest.raises(MinivlmError, match="empty"):
        collate([Row("", [], [])], pad_id=0)
