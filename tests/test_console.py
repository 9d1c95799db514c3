"""Notes on stderr."""

from minivlm.console import note, note_once


def test_a_note_is_a_line_on_stderr(capsys):
    note("look"), note("look")
    assert capsys.readouterr() == ("", "minivlm: look\nminivlm: look\n")


def test_what_is_told_once_is_told_once(capsys):
    for text in ("a film is cut off", "a picture is large", "a film is cut off"):
        note_once(text)
    assert capsys.readouterr().err == "minivlm: a film is cut off\nminivlm: a picture is large\n"
