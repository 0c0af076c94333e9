"""Turns at the GPU: most tests share it, one that fills its memory waits until it is alone."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Use the GPU, beside the other processes that do or without them.

    Args:
        folder: of two lock files; the same for all processes.
    """
    with open(folder / "gate.lock", "a") as gate, open(folder / "gpu.lock", "a") as gpu:
        # Who waits to be alone holds the gate meanwhile: otherwise others would come in forever.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
