"""What ends a run in one line instead of a traceback."""


class BadInput(Exception):
    """A wrong flag, config, file, checkpoint or device count.

    Its message is one line that names what is wrong, where, and the mend. `launch.py` prints it and exits with 2.
    """


class Elsewhere(Exception):
    """Another process failed, and tells of it itself; `code` is the exit code it ends with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def line_of(error: BaseException) -> str:
    """What an error says, and what was noted at it, in one line: a save that failed under way is such a note."""
    words = [str(error).strip() or type(error).__name__, *getattr(error, "__notes__", [])]
    return " ".join("; ".join(words).split())
