"""Writing shards in several processes."""

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from dataio.core.parent_process import die_with_parent
from dataio.sharding.plan import ShardPlan, ShardSpec
from dataio.sharding.writer import write_shard
from dataio.sources.source import Source

_worker: dict[str, Any] = {}


def _start_worker(output: Path, plan: ShardPlan, source: Source, label: str) -> None:
    die_with_parent(signal.SIGKILL)
    # The parent handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(output=output, plan=plan, source=source, label=label)


def _work(task: ShardSpec) -> ShardSpec:
    write_shard(_worker["output"], _worker["plan"], task, _worker["source"], _worker["label"])
    return task


def run_tasks(
    output: Path, plan: ShardPlan, source: Source, tasks: list[ShardSpec], workers: int, label: str
) -> Iterator[ShardSpec]:
    """Write shards in this process or in `workers` others; yields each once it is written.

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
                f"a worker process was killed (out of memory?); run the same again, with fewer than {workers} "
                "workers if it happens again",
                field="output",
                value=output,
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
