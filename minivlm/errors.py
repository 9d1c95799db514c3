"""The one exception that users are meant to see."""


class MinivlmError(Exception):
    """Something the caller can mend. The message is one line: what was wrong, and what to do about it.

    The command line prints it after `minivlm: ` and exits with status 1; a traceback appears only with `--debug`.
    Everything else that escapes is a bug of ours.
    """
