"""RUN/exit.json: a run's exit code for scripts, since torchrun turns every exit code into 1.

Imports nothing heavy: a restarted worker reads the file before it waits seconds for PyTorch.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dataio.core.atomic import write_text
from engines.runtime.command import EXIT_RUN_AGAIN, EXIT_USER_ERROR
from engines.runtime.paths import find_config

EXIT = "exit.json"


def write_exit(folder: Path, code: int, message: str, reason: str = "") -> None:
    """Write exit.json.

    Args:
        code: 0 finished, 2 a user's error, 75 stopped and saved, 1 anything else.
        reason: of a stop: a signal's name, or the stop file's.
    """
    content = {"code": code, "message": message, **({"reason": reason} if reason else {})}
    write_text(folder / EXIT, json.dumps(content) + "\n")


def read_exit(folder: Path) -> dict[str, Any] | None:
    """The content of exit.json; None while the run goes, or if the file is unreadable."""
    try:
        content = json.loads((folder / EXIT).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("code"), int) else None


def previous_exit_code(argv: Sequence[str], default_config: Path) -> int | None:
    """The exit code of a run that torchrun restarts although it must not go on; else None.

    `torchrun --max-restarts` treats a worker that stopped on request (75) or refused its
    configuration (2) as failed, and starts it again.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    folder = guess_run_folder(argv, default_config)
    content = None if folder is None else read_exit(folder)
    return content["code"] if content and content["code"] in (EXIT_RUN_AGAIN, EXIT_USER_ERROR) else None


def guess_run_folder(argv: Sequence[str], default_config: Path) -> Path | None:
    """The run folder that flags and configuration file name, without checking either.

    There exit.json is written when the configuration itself cannot be parsed.
    """
    run_dir: str | None = None
    file = str(default_config)
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--run.dir", "--config"):
            value = value if equals else next(iter(argv[index + 1 :]), "")
            run_dir, file = (value, file) if name == "--run.dir" else (run_dir, value)
    if run_dir is not None:
        return Path(run_dir) if run_dir else None
    try:
        return Path(yaml.safe_load(find_config(file).read_text())["run"]["dir"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def report_unparsed(error: Exception, argv: Sequence[str], default_config: Path) -> None:
    """Write RUN/exit.json for a command line that cannot be parsed, where RUN exists."""
    folder = guess_run_folder(argv, default_config)
    if folder is not None and folder.is_dir():
        write_exit(folder, EXIT_USER_ERROR, str(error))
