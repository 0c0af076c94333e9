"""What every command shares: one-line errors, exit codes, and the argument parser."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from dataio.core.errors import UserError

EXIT_USER_ERROR = 2
EXIT_RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: "stopped, run me again"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class SharedError(UserError):
    """A UserError that every rank raises alike; only rank 0 prints it."""


class Stopped(Exception):
    """Raised where a process was asked to stop, by the signal that is named; run again, it continues."""


def is_main_process() -> bool:
    """Whether this is rank 0, also before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors as one line and no abbreviated flags.

    Abbreviations are off because `--optim.l` would silently set `--optim.lr`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the parser's (often many-lined) message as one UserError line."""
        text = str(ex if ex is not None and str(ex) else message)
        raise UserError(f"{' '.join(text.split())} (see --help)") from None


def counts_of(flag: str, text: str, *, least: int = 1, example: str) -> list[int]:
    """The numbers of a flag such as --gpus 1,4,8.

    Raises:
        UserError: something else, or a number below `least`.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < least:
        raise UserError(f"{flag} {text}: expected numbers from {least} on, such as {example}")
    return counts


def divide(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own words, and the dotted flags (with their values) that are a training's."""
    own: list[str] = []
    flags: list[str] = []
    into = own
    for word in words:
        if word.startswith("--"):
            into = flags if "." in word.partition("=")[0] else own
        into.append(word)
    return own, flags


def verdict_in_file() -> bool:
    """Whether a batch script started this process, and will read the outcome in RUN/exit.json."""
    return os.environ.get("TELLTALE_VERDICT") == "file"


def run_command(main: Callable[[], int | None], *, at_once: bool = False) -> NoReturn:
    """Run `main` and leave with its exit code; a UserError becomes one line and code 2.

    Args:
        at_once: leave without Python's own end, in which a library's threads may abort a
            process whose work is done.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if is_main_process() or not isinstance(error, SharedError):
            print(f"error: {error.for_command_line()}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except Stopped as signal:
        print(f"stopped by {signal}; run the same command to continue", flush=True)
        code = EXIT_RUN_AGAIN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader (head, less) went away; a second flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code in (EXIT_USER_ERROR, EXIT_RUN_AGAIN) and verdict_in_file():
        # A batch script reads RUN/exit.json; of another code torchrun would make a failure with a
        # traceback, and restart what has stopped as it was told.
        code = 0
    if at_once:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
