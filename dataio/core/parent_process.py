"""Child processes that end with their parent."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Let the kernel send this process a signal when its parent ends, even by SIGKILL.

    Args:
        parent: its process id, to notice that it ended before this call; None if unknown.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent if parent is not None else os.getppid() == 1:
        os.kill(os.getpid(), number)
