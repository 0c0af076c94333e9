"""Benchmark cases of saving: how long training waits, and when the file is safe."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engines.benchmark.case import BenchmarkSettings, Group, Run
from engines.benchmark.detector import make_trainer, synchronize
from engines.checkpoint.async_saver import Saver
from engines.checkpoint.files import CheckpointFolder
from engines.train.resume import checkpoint_state
from engines.train.trainer import Trainer

_CPU_SIDE = 32  # the model is that of the group `step`; only its steps are cheaper


class _Timed(CheckpointFolder):
    """Notes when the last checkpoint was safely on disk."""

    durable = 0.0

    def save(self, step: int, state: dict[str, Any]) -> Path:
        path = super().save(step, state)
        self.durable = time.perf_counter()
        return path


def _measure(
    trainer: Trainer,
    settings: BenchmarkSettings,
    save: Callable[[], None],
    durable: Callable[[], float],
    size: Callable[[], int],
) -> Run:
    """Save between steps, some times over.

    Args:
        save: what the loop calls and waits for. durable: waits until it is on disk, and says
            when it was. size: bytes of the last file.

    Returns:
        saves per second of waiting. extra: stall_ms (median), durable_ms (median time from the
        call until file and folder are synced), step_ms while nothing is written and
        step_ms_writing of the step that follows a save.
    """
    stalls: list[float] = []
    until, quiet, busy, written = [], [], [], 0
    begin = time.perf_counter()
    while not stalls or time.perf_counter() - begin < settings.seconds:
        quiet.append(_step(trainer, settings))
        called = time.perf_counter()
        save()
        stalls.append(time.perf_counter() - called)
        busy.append(_step(trainer, settings))
        until.append(durable() - called)
        written += size()
    return Run(
        len(stalls),
        sum(stalls),
        written,
        {
            "stall_ms": 1e3 * statistics.median(stalls),
            "durable_ms": 1e3 * statistics.median(until),
            "step_ms": 1e3 * statistics.median(quiet),
            "step_ms_writing": 1e3 * statistics.median(busy),
            "file_mb": written / len(stalls) / 1e6,
        },
    )


def _step(trainer: Trainer, settings: BenchmarkSettings) -> float:
    """Seconds of a step, the device's part too: a save must not be charged for its queue."""
    begin = time.perf_counter()
    trainer.train_step()
    synchronize(settings)
    return time.perf_counter() - begin


@contextmanager
def _saving(
    trainer: Trainer, settings: BenchmarkSettings, folder: Path, *, background: bool
) -> Iterator[Callable[[], Run]]:
    store = _Timed(folder / "checkpoints", keep=2)
    saver = Saver(store, folder / "best.pt", lambda: None, background=background)

    def save() -> None:
        saver.checkpoint(checkpoint_state(trainer, metrics_offset=0, wandb_id=""))

    def durable() -> float:
        saver.finish()
        return store.durable

    def size() -> int:
        return store.path(store.steps()[-1]).stat().st_size

    yield lambda: _measure(trainer, settings, save, durable, size)
    saver.close()


def measure_saves(trainer: Trainer, settings: BenchmarkSettings, folder: Path, *, background: bool) -> Run:
    """Our saves into a folder, the first ones not counted; see `_measure` for `extra`."""
    with _saving(trainer, settings, folder, background=background) as once:
        once()
        return once()


def _ours(background: bool) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        trainer = make_trainer(settings, _CPU_SIDE)
        with (
            tempfile.TemporaryDirectory(dir=settings.folder) as folder,
            _saving(trainer, settings, Path(folder), background=background) as once,
        ):
            yield once

    return case


@contextmanager
def _plain(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """What most loops do: torch.save of the live state to the final name, nothing synced.

    `durable_ms` is with an fsync of the file afterwards, which the loop does not wait for here.
    """
    trainer = make_trainer(settings, _CPU_SIDE)
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        path = Path(folder) / "checkpoint.pt"

        def save() -> None:
            torch.save(trainer.state(), path)

        def durable() -> float:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            return time.perf_counter()

        yield lambda: _measure(trainer, settings, save, durable, lambda: path.stat().st_size)


checkpoint = Group(
    "checkpoint",
    "saves of the whole training state, per second that the step loop waits for them",
    "saves",
    {
        "telltale (in the background)": _ours(background=True),
        "telltale, checkpoint.background false": _ours(background=False),
        "torch.save, not synced": _plain,
    },
)
GROUPS = {checkpoint.name: checkpoint}
