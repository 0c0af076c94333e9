"""Saving while training goes on: the state is copied at once, one thread writes it.

What a full or failing disk does here: the write is warned of, what was there stays, and the
next save tries again; only the run's last one must succeed. Any other exception of the thread
is a programming error, and is raised by the next call.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dataio.core.errors import UserError
from engines.checkpoint import files as checkpoints
from engines.checkpoint.files import CheckpointFolder
from engines.runtime import fault_injection as faults


def snapshot(state: Any) -> Any:
    """A copy that shares no memory with `state`: tensors on the CPU, dicts and lists as plain ones.

    Tensors keep their layout in memory: a fused optimiser takes it for that of its parameters.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


class Saver:
    """Writes a run's checkpoints and best.pt in the order in which they were given.

    At most one checkpoint waits to be written: a second one first waits for the first, so
    none is skipped. A checkpoint is never committed before the best.pt that it speaks of, nor
    before the log's lines that it counts. Use on rank 0 only.

    Args:
        store: the checkpoints' folder. best: path of best.pt.
        sync_log: puts metrics.jsonl safely on disk; called before each commit.
        background: whether a thread writes, or the caller.
    """

    def __init__(
        self, store: CheckpointFolder, best: Path, sync_log: Callable[[], None], *, background: bool
    ) -> None:
        self.store, self._best_path, self._sync_log = store, best, sync_log
        # Its thread is joined when the interpreter ends, so that an exit never cuts a save short.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving") if background else None
        self._checkpoint: Future[None] | None = None
        self._best: Future[None] | None = None
        # A best.pt that could not be written yet, with its step.
        self._owed: tuple[dict[str, Any], int] | None = None
        self.failed = ""

    def best(self, state: dict[str, Any]) -> None:
        """Write best.pt; nothing may change `state` any more (see `snapshot`)."""
        self._best = self._settle(self._best)
        self._best = self._start(lambda: self._write_best(state))

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Commit a checkpoint of `state["step"]`, and delete what is older than the last few.

        Nothing may change `state` any more (see `snapshot`).
        """
        self._checkpoint = self._settle(self._checkpoint)
        self._checkpoint = self._start(lambda: self._write_checkpoint(state))

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            UserError: the last checkpoint or best.pt could not be written.
        """
        self._best, self._checkpoint = self._settle(self._best), self._settle(self._checkpoint)
        if self.failed:
            raise UserError(
                f"{self.failed}; mend that and run the same command: it continues after "
                f"{self._newest()}, for that is the newest checkpoint"
            )
        self.store.retain()  # a kill may have come between the last commit and the deletion

    def close(self) -> None:
        """Wait for what is being written, whatever became of it."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _newest(self) -> str:
        steps = self.store.steps()
        return f"step {steps[-1]}" if steps else "no step at all"

    def _start(self, work: Callable[[], None]) -> "Future[None] | None":
        if self._thread is not None:
            return self._thread.submit(work)
        work()
        return None

    @staticmethod
    def _settle(earlier: "Future[None] | None") -> None:
        """Wait for an earlier write, and raise what it raised; None, for it is over."""
        if earlier is not None:
            earlier.result()

    def _write_best(self, state: dict[str, Any]) -> None:
        self._owed = (state, state["step"])
        with _Lenient(self, self._best_path):
            self._pay()

    def _pay(self) -> None:
        if self._owed is not None:
            state, step = self._owed
            faults.inject("best.write", step)
            checkpoints.save(self._best_path, state)
            self._owed = None

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        step = state["step"]
        with _Lenient(self, self.store.path(step)):
            self._pay()
            self._sync_log()
            self.store.save(step, state)


class _Lenient:
    """Turns a failure of the disk into a warning; success clears the one before."""

    def __init__(self, saver: Saver, path: Path) -> None:
        self._saver, self._path = saver, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            self._saver.failed = ""
            return False
        if not isinstance(error, OSError):
            return False
        self._saver.failed = f"{self._path}: could not be written ({error.strerror or error})"
        print(
            f"WARNING: {self._saver.failed}. Training goes on and the next save tries again; until then a kill "
            f"falls back to {self._saver._newest()}",
            file=sys.stderr,
            flush=True,
        )
        return True
