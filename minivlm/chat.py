"""A conversation in the terminal: `python -m minivlm.run --chat`.

Ctrl-C stops the answer and keeps what was said of it; Ctrl-D or /quit ends the conversation. Questions and answers go
into the history, which the model is shown again with every question.
"""

import sys
from contextlib import suppress

from minivlm.console import explain, messages_of, note
from minivlm.errors import MinivlmError

HELP = """\
/image X   show a picture with the next question: file, URL or data: URI; several are shown in order
/video X   show a film with the next question, likewise
/clear     forget the conversation, its pictures and films
/help      this
/quit      leave (or Ctrl-D)
Ctrl-C     stop the answer\
"""


class Chat:
    """`vlm` answers; `sampling` are the arguments of its `stream`; `system` opens every conversation. With `debug` an
    error ends the conversation with its traceback. `film_options`: `fps` or `num_frames` of every film."""

    def __init__(
        self, vlm, sampling: dict, system: str | None = None, debug: bool = False, film_options: dict | None = None
    ):
        self.vlm, self.sampling, self.debug, self.film_options = vlm, sampling, debug, film_options
        self.opening = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        self.clear()

    def clear(self) -> None:
        self.messages = list(self.opening)
        self.images, self.films = [], []  # PIL pictures and KeptFilms, shown with the next question

    def run(self, prompt: str | None = None, images: list[str] = (), films: list[str] = ()) -> int:
        """Until /quit or the end of the input. `prompt` is asked first; `images` and `films` go with the first
        question."""
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            import_readline()
            say("/help says what there is besides asking; Ctrl-D leaves")
        for image in images:
            self.show(image)
        for film in films:
            self.show_film(film)
        line = prompt or ""
        while True:
            try:
                if line == "/quit":
                    return 0
                self.obey(line)
                line = input("> " if at_terminal else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                line = ""
                say("\n/quit or Ctrl-D leaves")

    def obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/clear":
            self.clear()
            say("forgotten")
        elif command == "/image":
            self.show(rest.strip())
        elif command == "/video":
            self.show_film(rest.strip())
        elif command.startswith("/") and "/" not in command[1:]:  # a path is a question
            say(HELP)
        elif line:
            self.ask(line)

    def show(self, image: str) -> None:
        """Opened at once, so that a misspelt name is known before the question is typed."""
        from minivlm.open_image import open_image

        try:
            picture = open_image(image)
        except MinivlmError as error:
            note(explain(error))
            return
        self.images.append(picture)
        say(f"picture {len(self.images)} for the next question, {picture.width} × {picture.height} pixels")

    def show_film(self, source: str) -> None:
        """Looked at once, by the model's own rule, so that it need not be opened again with every question."""
        from minivlm.videos import KeptFilm

        film = KeptFilm(source)
        try:
            self.vlm.preprocess([messages_of("", [], None, [film], self.film_options)])
        except MinivlmError as error:
            note(explain(error))
            return
        self.films.append(film)
        taken, there = len(film.film.frames), film.film.num_source_frames
        say(f"film {len(self.films)} for the next question, {taken} of its {there} frames")

    def ask(self, text: str) -> None:
        """Streams the answer. After an error the question counts as not asked, and what it shows waits."""
        messages = self.messages + messages_of(text, self.images, None, self.films, self.film_options)
        said = ""
        try:
            for piece in self.vlm.stream(messages, **self.sampling):
                print(piece, end="", flush=True)
                said += piece
            print()
        except KeyboardInterrupt:
            print()
            say("(stopped)")
        except Exception as error:  # of whatever kind: the conversation so far is worth keeping
            if self.debug:
                raise
            note(explain(error))
            return
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
        self.images, self.films = [], []


def import_readline() -> None:
    """Line editing and history, where Python was built with it."""
    with suppress(ImportError):
        import readline  # noqa: F401


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
