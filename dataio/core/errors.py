"""User errors, and the one-line forms of everybody else's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: the file, key or argument, what was found, what was expected and
    what to do. Commands print it without a traceback and exit with code 2; every other
    exception is a programming error and keeps its traceback.

    Args:
        message: as above; without the argument's name where `field` gives it.
        field: the argument it is about, by its Python name (`samples_per_shard`).
        value: what was passed for it; left out of the message where it is None.

    Example:
        >>> str(UserError("expected 1 or more", field="workers", value=0))
        'workers 0: expected 1 or more'
        >>> UserError("expected 1 or more", field="workers", value=0).for_command_line()
        '--workers 0: expected 1 or more'
    """

    def __init__(self, message: str, *, field: str = "", value: Any = None) -> None:
        super().__init__(message)
        self.message, self.field, self.value = message, field, value

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.field, self.value)

    def __str__(self) -> str:
        return self._text(self.field)

    def for_command_line(self) -> str:
        """The message with the flag (`--samples-per-shard`) in place of the argument's name."""
        return self._text(f"--{self.field.replace('_', '-')}" if self.field else "")

    def _text(self, name: str) -> str:
        subject = name if self.value is None else f"{name} {self.value}"
        text = f"{subject}: {self.message}" if name else self.message
        # File names and file contents may hold line breaks; the message stays one line.
        return text.replace("\r", "\\r").replace("\n", "\\n")


def _rebuild(kind: type[UserError], message: str, field: str, value: Any) -> UserError:
    return kind(message, field=field, value=value)


def one_line(error: BaseException | str) -> str:
    """An error's text with all white space folded into single spaces."""
    return " ".join(str(error).split())


def reason_of(error: OSError) -> str:
    """What the operating system says of an error, in one line."""
    return one_line(error.strerror or str(error))


@contextmanager
def writing(path: str | Path, *, field: str = "", hint: str = "choose another") -> Iterator[None]:
    """Turn an OSError of writing `path` into "PATH: cannot be written (reason); hint".

    Args:
        field: the argument that named the path, see `UserError`.
        hint: what to do; empty for none.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        text = f"cannot be written ({reason_of(error)})" + (f"; {hint}" if hint else "")
        if field:
            raise UserError(text, field=field, value=path) from None
        raise UserError(f"{path}: {text}") from None


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError into a UserError, for packages that do not know UserError (`models`).

    Args:
        prefix: put before the error's own text.

    Raises:
        UserError: the block raised a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{one_line(error)}") from None
