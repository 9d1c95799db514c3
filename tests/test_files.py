"""Reading a checkpoint's small files, and putting foreign words into one line."""

import pytest

from minivlm.errors import MinivlmError
from minivlm.files import one_line, read_json, read_text


@pytest.mark.parametrize("text", ["a\nb\tc", "\x1b[31mred\x07", "x" * 5000, "", "naïve 你好"])
def test_one_line_is_one_short_line_without_controls(text):
    line = one_line(text, 40)
    assert len(line) <= 40 and (line == "" or line.isprintable())


def test_one_line_keeps_both_ends():
    line = one_line("begin" + "x" * 500 + "end", 60)
    assert line.startswith("begin") and line.endswith("end") and len(line) == 60
    assert one_line("short") == "short"


def test_an_absent_file_is_an_empty_object(tmp_path):
    assert read_json(tmp_path / "absent.json") == {}


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(MinivlmError, match=r"a\.json is damaged") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_text_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xff")
    with pytest.raises(MinivlmError, match=r"a\.jinja is damaged"):
        read_text(tmp_path / "a.jinja")
