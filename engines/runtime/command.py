"""What every command shares: one-line errors and exit codes."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from dataio.core.errors import UserError
from dataio.core.log import log_to_console
from engines.runtime.ending import end_in

EXIT_USER_ERROR = 2
EXIT_RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: "stopped, run me again"


class SharedError(UserError):
    """A UserError that all ranks raise together; only rank 0 prints it."""


class NonFiniteError(SharedError):
    """The loss or its gradient is infinite or not a number, on all ranks."""


class Stopped(Exception):
    """The process was asked to stop by the signal in the message; the same command continues."""


def is_main_process() -> bool:
    """Whether this is rank 0, also before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def reports_exit_in_file() -> bool:
    """Whether a batch script started this process and reads the outcome from RUN/exit.json."""
    return os.environ.get("TELLTALE_VERDICT") == "file"


def exit_code_of(code: int) -> int:
    """The code that a process ends with; 0 where a batch script reads the outcome from RUN/exit.json."""
    # torchrun would report any other code as a failure, with a traceback, and restart a run that
    # stopped on request.
    return 0 if code in (EXIT_USER_ERROR, EXIT_RUN_AGAIN) and reports_exit_in_file() else code


def run_command(
    main: Callable[[], int | None], *, at_once: bool = False, within: float | None = None
) -> NoReturn:
    """Run `main` and leave with its exit code; a UserError becomes one line and code 2.

    Args:
        at_once: use os._exit: library threads may abort during interpreter shutdown.
        within: seconds for the interpreter's own end; after them it is ended, with the same code.
    """
    log_to_console()
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
    code = exit_code_of(code)
    if at_once:
        sys.stderr.flush()
        os._exit(code)
    if within is not None:
        end_in(within, code, "the process")
    sys.exit(code)
