"""A run in its folder: the lock, the run itself, exit.json. Shared by training and finetuning."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dataio.core.errors import UserError, writing
from dataio.core.log import log
from engines.runtime.command import EXIT_USER_ERROR, exit_code_of, reports_exit_in_file
from engines.runtime.distributed import World, on_all_ranks, shutdown_distributed
from engines.runtime.ending import END_SECONDS, ended_in
from engines.runtime.exit_file import EXIT, write_exit
from engines.runtime.watchdog import LostRankError

LOCK, LOCK_WAIT_SECONDS = ".lock", 60.0


class Outcome(NamedTuple):
    """How a run ended: see `engines.runtime.exit_file.write_exit`."""

    code: int
    message: str
    reason: str = ""


def run_in_folder(folder: Path, world: World, run: Callable[[], Outcome]) -> int:
    """Run `run` while rank 0 holds the folder's lock, then write exit.json; every rank calls this.

    Returns:
        the outcome's code; 1 where another rank was lost.

    Raises:
        UserError: on every rank alike; exit.json is written by then.
    """
    outcome, lock = Outcome(1, "a programming error; see the log"), None
    try:
        # Rank 0 takes the lock and the others wait. Not on_rank0: a lock cannot be sent to them.
        lock = on_all_ranks(world, lambda: _claim(folder) if world.is_main else None)
        outcome = run()
    except UserError as error:
        outcome = Outcome(EXIT_USER_ERROR, error.for_command_line())
        raise
    except KeyboardInterrupt:
        outcome = Outcome(130, "interrupted; run the same command to continue", "SIGINT")
        raise
    except LostRankError as error:
        outcome = Outcome(1, f"{error}; run the same command to continue")
        log.error(outcome.message)
    finally:
        if world.is_main and lock is not None:
            write_exit(folder, *outcome)
            lock.release()
        # NCCL waits here for peers that may be gone; the outcome is on disk.
        with ended_in(END_SECONDS, exit_code_of(outcome.code), f"{folder}: leaving the process group"):
            shutdown_distributed(world)
    return outcome.code


def _claim(folder: Path) -> "FolderLock":
    """Create and lock the folder; remove what an earlier run left there for scripts."""
    with writing(folder, field="run.dir"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        (folder / EXIT).unlink(missing_ok=True)
        # A batch script removes the file itself; by now it may hold that script's own request.
        if not reports_exit_in_file():
            (folder / "stop").unlink(missing_ok=True)
    return lock


def check_run_folder(folder: Path) -> None:
    """Check that a run could use its folder, without creating it.

    Raises:
        UserError: it could not be written, or another run holds it.
    """
    with writing(folder, field="run.dir"):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            code = errno.EEXIST if existing == folder.absolute() else errno.ENOTDIR
            raise OSError(code, os.strerror(code))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    if (folder / LOCK).is_file():
        FolderLock(folder, wait_seconds=0.0, sign=False).release()


def refuse_to_start_over(folder: Path, steps: list[int]) -> None:
    """Check that `resume: none` starts in a folder without checkpoints.

    Args:
        folder: of the checkpoints. steps: of those in it, ascending.

    Raises:
        UserError: there are some.
    """
    if steps:
        raise UserError(
            f"{folder} holds checkpoints up to step {steps[-1]}; choose another run.dir, remove them, or use "
            "resume auto",
            field="resume",
            value="none",
        )


class FolderLock:
    """An exclusive lock on a run folder, held until the process ends.

    Args:
        sign: write into the lock's file who holds it.

    Raises:
        UserError: another run held it for `wait_seconds`.
    """

    def __init__(self, folder: Path, wait_seconds: float = LOCK_WAIT_SECONDS, *, sign: bool = True) -> None:
        self._file = open(folder / LOCK, "a+" if sign else "r")  # noqa: SIM115 (held open on purpose)
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "an unknown process"
                    raise UserError(
                        f"{folder}: another run is using this folder ({holder}); stop it or choose another run.dir"
                    ) from None
                time.sleep(0.2)
        if not sign:
            return
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()
