"""Saving in the background: the state is copied at once, and one thread writes it.

A full or failing disk does not stop training: the user is warned, earlier files stay, and the
next save tries again; only the run's last save must succeed. Any other exception of the thread
is a programming error, and is raised by the next call.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dataio.core.errors import UserError, reason_of
from dataio.core.log import log
from engines.checkpoint import files as checkpoints
from engines.checkpoint.files import CheckpointFolder
from engines.runtime import fault_injection as faults


def snapshot(state: Any) -> Any:
    """A copy that shares no memory with `state`: tensors on the CPU, dicts and lists as plain ones.

    Tensors keep their layout in memory: a fused optimizer assumes that of its parameters.
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
    none is skipped. A checkpoint is committed after the best.pt that it names and after the log
    lines that it counts. Use on rank 0 only.

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
        self._checkpoint_write: Future[None] | None = None
        self._best_write: Future[None] | None = None
        # A best.pt that could not be written yet, with its step.
        self._pending_best: tuple[dict[str, Any], int] | None = None
        self.failed = ""

    def best(self, state: dict[str, Any]) -> None:
        """Write best.pt; nothing may change `state` any more (see `snapshot`)."""
        self._wait(self._best_write)
        self._best_write = self._start(lambda: self._write_best(state))

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Commit a checkpoint of `state["step"]`, and delete what is older than the last few.

        Nothing may change `state` any more (see `snapshot`).
        """
        self._wait(self._checkpoint_write)
        self._checkpoint_write = self._start(lambda: self._write_checkpoint(state))

    def finish(self) -> None:
        """Wait for pending writes.

        Raises:
            UserError: the last checkpoint or best.pt could not be written.
        """
        self._wait(self._best_write)
        self._wait(self._checkpoint_write)
        if self.failed:
            raise UserError(
                f"{self.failed}; fix this and run the same command: it continues after "
                f"{self._newest()}, the newest checkpoint"
            )
        self.store.retain()  # a kill may have come between the last commit and the deletion

    def close(self) -> None:
        """Wait for pending writes, failed or not."""
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
    def _wait(earlier: "Future[None] | None") -> None:
        """Wait for an earlier write and raise its exception."""
        if earlier is not None:
            earlier.result()

    def _write_best(self, state: dict[str, Any]) -> None:
        self._pending_best = (state, state["step"])
        with _warn_on_disk_error(self, self._best_path):
            self._flush_pending()

    def _flush_pending(self) -> None:
        if self._pending_best is not None:
            state, step = self._pending_best
            faults.inject("best.write", step)
            checkpoints.save(self._best_path, state)
            self._pending_best = None

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        step = state["step"]
        with _warn_on_disk_error(self, self.store.path(step)):
            self._flush_pending()
            self._sync_log()
            self.store.save(step, state)


@contextlib.contextmanager
def _warn_on_disk_error(saver: Saver, path: Path) -> Iterator[None]:
    """Turn an error of the disk into a warning; a success clears the one before."""
    try:
        yield
        saver.failed = ""
    except OSError as error:
        saver.failed = f"{path}: could not be written ({reason_of(error)})"
        log.warning(
            f"{saver.failed}. Training goes on and the next save tries again; until then a kill "
            f"falls back to {saver._newest()}"
        )
