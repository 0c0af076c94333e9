"""Writing many shards at once, and saying how far it is."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataio.core.errors import UserError
from dataio.core.parent_process import die_with_parent
from dataio.sharding.plan import Plan, ShardTask
from dataio.sharding.writer import write_shard
from dataio.sources.source import Source

_worker: dict[str, Any] = {}


def default_workers() -> int:
    return len(os.sched_getaffinity(0))


def _start_worker(output: Path, plan: Plan, source: Source, label: str) -> None:
    die_with_parent(signal.SIGKILL)
    # The parent handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(output=output, plan=plan, source=source, label=label)


def _work(task: ShardTask) -> ShardTask:
    write_shard(_worker["output"], _worker["plan"], task, _worker["source"], _worker["label"])
    return task


def run_tasks(
    output: Path, plan: Plan, source: Source, tasks: list[ShardTask], workers: int, label: str
) -> Iterator[ShardTask]:
    """Write shards in this process or in `workers` others; yields each when it is there.

    Raises:
        UserError: a worker was killed. OSError: a shard cannot be written.
    """
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            write_shard(output, plan, task, source, label)
            yield task
        return
    # Spawned, not forked: the parent may have threads (DALI, torch).
    with concurrent.futures.ProcessPoolExecutor(
        max(1, min(workers, len(tasks))),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(output, plan, source, label),
    ) as pool:
        pending = [pool.submit(_work, task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(pending):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"--output {output}: a worker process was killed (out of memory?); run the same again, "
                f"with fewer than --workers {workers} if it happens again"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Progress:
    """A bar where a person watches, a line every 30 s where a log does."""

    def __init__(self, total: int, done: int, quiet: bool, what: str = "sharded") -> None:
        self._total, self._done, self._quiet, self._what = total, done, quiet, what
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True)
        self._spoke = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._spoke > 30:
            self._spoke = time.monotonic()
            print(f"{self._done}/{self._total} images {self._what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
