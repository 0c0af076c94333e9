"""Process trees: who descends from whom, and ending all of them."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own: slurmstepd detaches from slurmd."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn`: the child gets this signal when its parent ends, however that ends."""
    return lambda: prctl(PR_SET_PDEATHSIG, number)


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        own = children(todo.pop())
        found += own
        todo += own
    return found


def is_zombie(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def reap() -> None:
    """Wait for every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def kill_tree(pid: int, number: signal.Signals = signal.SIGKILL, seconds: float = 5.0) -> bool:
    """Signal all descendants of pid (not pid itself), again until none is left; whether none is left.

    Nothing is ever ended by name: other clusters may run on this machine.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        living = [child for child in descendants(pid) if not is_zombie(child)]
        if not living:
            return True
        for child in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        reap()
        time.sleep(0.05)
    return False
