"""The library's messages: `log` for everybody, `progress` for work that a person waits for.

The library only logs; whether and where it shows is the program's choice, as usual with
`logging`. Commands call `log_to_console`.
"""

import logging
import sys

log = logging.getLogger("telltale")
progress = logging.getLogger("telltale.progress")


class _Console(logging.Handler):
    """Information to standard output; progress, warnings and errors to standard error.

    Writes to what `sys.stdout` and `sys.stderr` are at the time, and lets a BrokenPipeError
    pass, so that a command piped into `head` ends quietly.
    """

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        aside = record.levelno >= logging.WARNING or record.name == progress.name
        print(f"{prefix}{record.getMessage()}", file=sys.stderr if aside else sys.stdout, flush=True)


def log_to_console() -> None:
    """Show the library's messages on this process's standard output and standard error."""
    if not any(isinstance(handler, _Console) for handler in log.handlers):
        log.addHandler(_Console())
    log.setLevel(logging.INFO)
    log.propagate = False
