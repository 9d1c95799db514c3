"""The conversation in the terminal, driven through its standard input."""

import io

import pytest
from fake_vlm import FakeVLM
from films import write_film
from PIL import Image

from minivlm.chat import Chat


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types the lines, returns (what the model was asked, stdout, stderr)."""

    def talk(*lines, system=None, prompt=None, images=(), films=(), film_options=None):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        vlm = FakeVLM()
        assert Chat(vlm, {"temperature": 0.5}, system, film_options=film_options).run(prompt, images, films) == 0
        out, err = capsys.readouterr()
        return [messages for messages, _ in vlm.asked], out, err

    return talk


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def texts(messages):
    return [(m["role"], part["text"]) for m in messages for part in m["content"] if part["type"] == "text"]


def count_pictures(messages):
    return sum(part["type"] == "image" for m in messages for part in m["content"])


def test_chat_remembers_what_was_said(talk):
    asked, out, _ = talk("one", "", "two")
    assert texts(asked[0]) == [("user", "one")]
    assert texts(asked[1]) == [("user", "one"), ("assistant", "0 pictures: one"), ("user", "two")]
    assert out == "0 pictures: one\n0 pictures: two\n"


def test_chat_system_message_survives_clear(talk):
    asked, _, _ = talk("one", "/clear", "two", system="be brief")
    assert texts(asked[1]) == [("system", "be brief"), ("user", "two")]


def test_chat_shows_a_picture_once_and_keeps_it_in_the_history(talk, picture):
    asked, _, err = talk(f"/image {picture}", f"/image {picture}", "what", "again")
    assert [count_pictures(messages) for messages in asked] == [2, 2]
    assert "picture 2 for the next question, 3 × 2 pixels" in err
    assert [part["type"] for part in asked[0][0]["content"]] == ["image", "image", "text"]


def test_chat_forgets_what_waits_for_a_question(talk, picture, tmp_path):
    path = write_film(tmp_path / "a.mp4", 3)
    asked, _, _ = talk(f"/video {path}", f"/image {picture}", "/clear", "what")
    assert [part["type"] for part in asked[0][0]["content"]] == ["text"]


def films_of(messages):
    return [part for m in messages for part in m["content"] if part["type"] == "video"]


def test_chat_shows_a_film_that_it_opens_once(talk, tmp_path):
    path = str(write_film(tmp_path / "a.mp4", 24))
    asked, _, err = talk(f"/video {path}", "what", "again", film_options={"fps": 2})
    assert "film 1 for the next question, 2 of its 24 frames" in err
    (first,), (second,) = films_of(asked[0]), films_of(asked[1])
    assert first["fps"] == 2 and first["video"].source == path
    assert second["video"] is first["video"] and first["video"].film.indices == [0, 12]


def test_chat_begins_with_the_command_line_s_films_and_forgets_them(talk, tmp_path):
    path = str(write_film(tmp_path / "a.mp4", 24))
    asked, _, _ = talk("/clear", "later", prompt="what", films=[path, path])
    assert [len(films_of(messages)) for messages in asked] == [2, 0]


def test_chat_refuses_a_broken_film_at_once(talk, tmp_path):
    (tmp_path / "a.mp4").write_text("no film")
    asked, _, err = talk(f"/video {tmp_path / 'a.mp4'}", "/video none.mp4", "what")
    assert films_of(asked[0]) == [] and "it looks like text" in err and "none.mp4: no such file" in err


def test_chat_starts_with_the_command_line_s_question_and_picture(talk, picture):
    asked, out, _ = talk("again", prompt="what", images=[picture])
    assert count_pictures(asked[0]) == 1
    assert out.startswith("1 pictures: what\n")


def test_chat_names_a_picture_that_is_not_there(talk, tmp_path):
    asked, _, err = talk(f"/image {tmp_path}/none.png", "what")
    assert err.startswith("minivlm: ") and "none.png" in err and err.count("\n") == 1
    assert count_pictures(asked[0]) == 0


def test_chat_forgets_a_question_that_failed_and_keeps_its_picture(talk, picture):
    asked, _, err = talk(f"/image {picture}", "fail", "what")
    assert "minivlm: the picture is broken: give another\n" in err
    assert texts(asked[1]) == [("user", "what")] and count_pictures(asked[1]) == 1


def test_chat_outlives_a_bug_unless_debugging(talk):
    asked, _, err = talk("bug", "next")
    assert "minivlm: unexpected TypeError: no such thing" in err and len(asked) == 2
    with pytest.raises(TypeError):
        Chat(FakeVLM(), {}, debug=True).ask("bug")


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk):
    asked, out, err = talk("ctrl-c", "next")
    assert out == "0\n0 pictures: next\n" and "(stopped)" in err
    assert texts(asked[1]) == [("user", "ctrl-c"), ("assistant", "0"), ("user", "next")]


def test_ctrl_c_at_the_prompt_says_how_to_leave(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt(), "/quit"])

    def type_in(_):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_in)
    assert Chat(FakeVLM(), {}).run() == 0
    assert "/quit or Ctrl-D leaves" in capsys.readouterr().err


def test_quit_leaves_and_asks_nothing_more(talk):
    asked, _, _ = talk("/quit", "one")
    assert asked == []


@pytest.mark.parametrize("command", ["/help", "/imagine"])
def test_an_unknown_command_shows_the_help(talk, command):
    asked, _, err = talk(command)
    assert asked == [] and "/image X" in err


def test_a_path_at_the_start_of_a_question_is_no_command(talk):
    asked, _, _ = talk("/etc/hosts is a file, is it not?")
    assert len(asked) == 1
