"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake its user can mend.

    The message is one line that names the file, key or flag, what was found, what was
    expected and what to do. Commands print it without a traceback and exit with code 2;
    every other exception is a programming error and keeps its traceback.
    """

    def __str__(self) -> str:
        # Names of files and what was found in them may hold line breaks; the message stays one line.
        return super().__str__().replace("\r", "\\r").replace("\n", "\\n")
