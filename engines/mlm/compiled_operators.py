"""DeepSpeed compiles an operator on its first use: what is said before that silent minute."""

import os
import time
from pathlib import Path

from dataio.core.log import log

# The one that the CPU's collectives need; a GPU run compiles none, since the optimizer is PyTorch's.
_OPERATOR = "deepspeed_shm_comm"
_LONGEST_BUILD = 20 * 60  # seconds; it takes one or two minutes


def announce_compilation(folder: Path, *, waits_for_file: bool) -> None:
    """Log that an operator will be compiled, and name a lock that nobody holds any more.

    Args:
        folder: TORCH_EXTENSIONS_DIR.
        waits_for_file: whether this PyTorch waits until the lock's file is gone, which a killed
            process leaves behind; others lock the file, and the system unlocks it.
    """
    operator = folder / _OPERATOR
    if not (operator / f"{_OPERATOR}.so").is_file():
        log.info("DeepSpeed compiles its CPU operator; this takes about a minute, once")
    lock = operator / "lock"
    try:
        age = time.time() - os.stat(lock).st_mtime
    except OSError:
        return
    if waits_for_file and age > _LONGEST_BUILD:
        log.warning(
            f"{lock}: left by a killed process {age / 3600:.1f} hours ago, PyTorch waits for it; remove it"
        )
