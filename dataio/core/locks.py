"""File locks in a shard folder, for processes of one machine and of many."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dataio.core.log import log, progress

# What flock says where a file system has none (NFS without lockd, Lustre without -o flock).
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: str = "") -> Iterator[IO[str]]:
    """Hold the lock of a file, which is made where it is missing.

    Locks keep processes from doing work twice; the shards' bytes do not depend on them, so
    a file system without locks gets a warning only.

    Args:
        shared: with others that hold it shared, not alone.
        wait: what to print before waiting for it; "" is not to wait.

    Raises:
        BlockingIOError: it is held and `wait` is "". OSError: it cannot be made.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                progress.info(wait)
                fcntl.flock(file, how)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning(
                    f"{path.parent}: this file system has no file locks ({error.strerror}): "
                    "start no task twice, and the first one before the others"
                )
                yield file
                return
            if _is_still(path, file):  # not removed while it was waited for
                yield file
                return


def alone(file: IO[str]) -> bool:
    """Whether a shared lock can be made an exclusive one at once; if so, it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether another process holds the lock."""
    try:
        with locked(path):
            return False
    except BlockingIOError:
        return True


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
