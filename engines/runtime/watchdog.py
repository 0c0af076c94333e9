"""Finds the rank that died or hangs: every process publishes its progress.

A process that dies breaks its connections, and the others' collectives fail at once. One that
hangs breaks nothing: the others wait. So a thread of each process watches its own progress. After
`train.timeout` without any, it compares what all ranks published, names the one that is behind,
and ends its process; the launcher ends the rest. On a GPU the host runs ahead of its device, and
a kernel that hangs leaves no rank behind the others: then no rank is named.

`torch.distributed.monitored_barrier` would name a rank too, but only for gloo, and as a barrier
in every step. NVIDIA's resiliency extension watches from outside the process, by a server on each
node, which a run of one process on a laptop does not have.
"""

import contextlib
import datetime
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dataio.core.log import log
from engines.runtime.distributed import World
from engines.runtime.rendezvous import run_store

TICK_SECONDS = 0.5
# A process that published nothing for so many intervals has ended (or its machine has).
SILENT_TICKS = 4
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection|[Tt]imed out")


class LostRankError(Exception):
    """Another process of the run has ended or cannot be reached."""


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


@dataclass(frozen=True)
class _Progress:
    """How far a process is: compared in this order.

    Attributes:
        step: steps done. stage: 0 after the last of them, 1 validating, 2 in the next. count: ticks within.
    """

    step: int = 0
    stage: int = 0
    count: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        return self.step, self.stage, self.count


class HangWatchdog:
    """A process's progress, published to the launcher's store and watched by a thread.

    Args:
        world: the processes. timeout_minutes: without progress, 0 for never.
        on_hang: is given the message, writes what must be written; then the process ends.
    """

    def __init__(self, world: World, timeout_minutes: float, on_hang: Callable[[str], None]) -> None:
        self._world, self._timeout, self._on_hang = world, 60 * timeout_minutes, on_hang
        self._progress = _Progress()
        self._changed, self._count = False, 0
        self._interval = max(TICK_SECONDS, world.size / 500)  # the store is one process
        self._store: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch: from here on, no tick for the timeout is a hang."""
        self._store = self._connect()
        self._publish()
        self._thread.start()

    def tick(self, step: int, stage: int) -> None:
        """Note progress; costs next to nothing.

        Args:
            step: steps done. stage: 0 after the last of them, 1 validating, 2 in the next.
        """
        before = self._progress
        repeated = (step, stage) == (before.step, before.stage)
        self._progress = _Progress(step, stage, before.count + 1 if repeated else 0)
        self._changed = True

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def diagnose(self) -> str:
        """Which ranks have ended (they publish nothing for a few seconds), and their last step."""
        if self._store is None:
            return "a connection was lost"
        before = self._published()
        with contextlib.suppress(dist.DistError):
            if self._store.check(["hangs"]):  # the rank that left gave the reason
                return self._store.get("hangs").decode()
        time.sleep(SILENT_TICKS * self._interval)
        after = self._published()
        silent = [
            f"rank {rank} on {status['host']} has ended or lost its connection, last heard of at step {status['step']}"
            for rank, status in sorted(after.items())
            if status["count"] == before.get(rank, {}).get("count")
        ]
        return "; ".join(silent) or "the connection to the other ranks was lost, and none of them is silent"

    def _connect(self) -> Any:
        if not self._world.distributed:
            return None
        # A connection of its own: the process group's is held by whatever waits in it.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=20),
        )
        return run_store(f"{self._world.run_id}/watchdog", store)

    def _publish(self) -> None:
        if self._store is None:
            return
        self._count += 1
        status = {
            "step": self._progress.step,
            "place": self._progress.place,
            "host": socket.gethostname(),
            "count": self._count,
        }
        with contextlib.suppress(dist.DistError):  # without the store, the launcher has ended
            self._store.set(str(self._world.rank), json.dumps(status))

    def _published(self) -> dict[int, dict[str, Any]]:
        """What each rank published last."""
        statuses = {}
        with contextlib.suppress(dist.DistError):
            for rank in range(self._world.size):
                if self._store.check([str(rank)]):
                    statuses[rank] = json.loads(self._store.get(str(rank)))
        return statuses

    def _watch(self) -> None:
        still, before = 0.0, time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            # A process that was suspended does not hang: an interval counts at most twice its length.
            still, before = still + min(now - before, 2 * self._interval), now
            if self._changed:
                still, self._changed = 0.0, False
            self._publish()
            if 0 < self._timeout < still:
                self._end()

    def _end(self) -> None:
        # Two intervals, so that ranks that stopped a moment later have published it.
        self._over.wait(2 * self._interval)
        self._publish()
        message = self._hang_message()
        log.error(message)
        with contextlib.suppress(OSError, dist.DistError):
            self._on_hang(message)
            if self._store is not None:
                self._store.set("hangs", message)
        os._exit(1)

    def _hang_message(self) -> str:
        waited = f"no progress for {self._timeout / 60:g} minutes (train.timeout)"
        statuses = self._published()
        places = {rank: tuple(status["place"]) for rank, status in statuses.items()}
        if not places:
            return f"{waited} after step {self._progress.step} on {socket.gethostname()}"
        behind = sorted(rank for rank, place in places.items() if place == min(places.values()))
        if len(behind) == len(places) > 1:
            return f"{waited} after step {self._progress.step}, and no rank is behind the others"
        named = ", ".join(f"rank {rank} on {statuses[rank]['host']}" for rank in behind)
        return f"{waited}: {named} hangs after step {statuses[behind[0]]['step']}"
