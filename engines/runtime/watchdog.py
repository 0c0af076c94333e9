"""Finds the rank that died or hangs: every process publishes its progress.

A process that dies breaks its connections, and the others' collectives fail at once. One that
hangs breaks nothing: the others wait. So a thread of each process watches its own progress. After
`train.timeout` without any, it asks all ranks, through the launcher's store, to write what they are
doing into the run's folder (`engines.runtime.hang_report`). Then it compares what they published,
names the one that is behind, and ends its process; the launcher ends the rest. On a GPU the host
runs ahead of its device, and a kernel that hangs leaves no rank behind the others: then no rank
is named.

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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dataio.core.log import log
from engines.runtime.distributed import World
from engines.runtime.hang_report import HANG, say_doing, try_for, write_hang_report
from engines.runtime.rendezvous import run_store

TICK_SECONDS = 0.5
# A process that published nothing for so many intervals has ended (or its machine has).
SILENT_TICKS = 4
# To write what a rank is doing, and to wait for the others that do.
REPORT_SECONDS = 10.0
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
        folder: the run's. on_hang: is given the message, writes what must be written; then the process ends.
    """

    def __init__(
        self, world: World, timeout_minutes: float, folder: Path, on_hang: Callable[[str], None]
    ) -> None:
        self._world, self._timeout, self._on_hang = world, 60 * timeout_minutes, on_hang
        self._folder, self._reported = folder, False
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
            if self._in_store("report"):  # another rank has seen that the run hangs
                self._report()
            if 0 < self._timeout < still:
                self._end()

    def _in_store(self, *keys: str) -> bool:
        with contextlib.suppress(dist.DistError):
            return self._store is not None and bool(self._store.check(list(keys)))
        return False

    def _report(self) -> None:
        """Say what this rank is doing, in the store and in the run's folder; once."""
        if self._reported:
            return
        self._reported = True
        doing = say_doing(self._progress.stage)
        self._tell(f"doing/{self._world.rank}", doing)
        heading = f"after step {self._progress.step}, {doing}"
        try_for(REPORT_SECONDS, lambda: write_hang_report(self._folder, self._world.rank, heading))
        self._tell(f"reported/{self._world.rank}")

    def _tell(self, key: str, value: str = "") -> None:
        with contextlib.suppress(dist.DistError):
            if self._store is not None:
                self._store.set(key, value)

    def _end(self) -> None:
        # Two intervals, so that ranks that stopped a moment later have published it.
        self._over.wait(2 * self._interval)
        self._publish()
        self._tell("report")
        self._report()
        deadline = time.monotonic() + REPORT_SECONDS + 2 * self._interval
        reports = [f"reported/{rank}" for rank in range(self._world.size)]
        while self._store is not None and not self._in_store(*reports) and time.monotonic() < deadline:
            time.sleep(self._interval / 2)
        message = self._hang_message()
        log.error(message)
        try_for(REPORT_SECONDS, lambda: self._on_hang(message))
        self._tell("hangs", message)
        os._exit(1)

    def _hang_message(self) -> str:
        waited = f"no progress for {self._timeout / 60:g} minutes (train.timeout)"
        stacks = f"the stacks are in {self._folder / HANG}"
        statuses = self._published()
        places = {rank: tuple(status["place"]) for rank, status in statuses.items()}
        if not places:
            doing = say_doing(self._progress.stage)
            return f"{waited} after step {self._progress.step} on {socket.gethostname()}, {doing}; {stacks}"
        behind = sorted(rank for rank, place in places.items() if place == min(places.values()))
        if len(behind) == len(places) > 1:
            step = self._progress.step
            return f"{waited} after step {step}, and no rank is behind the others: {self._doings(behind)}; {stacks}"
        named = ", ".join(f"rank {rank} on {statuses[rank]['host']}" for rank in behind)
        others = f"the others: {self._doings(places.keys() - set(behind))}; " if len(places) > 1 else ""
        step = statuses[behind[0]]["step"]
        return f"{waited}: {named} hangs after step {step}, {self._doings(behind)}; {others}{stacks}"

    def _doings(self, ranks: Iterable[int]) -> str:
        """What these ranks said that they are doing, the most frequent first."""
        said: Counter[str] = Counter()
        for rank in ranks:
            doing = "without an answer: stopped, or held outside Python"
            with contextlib.suppress(dist.DistError):
                if self._in_store(f"doing/{rank}"):
                    doing = self._store.get(f"doing/{rank}").decode()
            said[doing] += 1
        return "; ".join(
            text if count == 1 else f"{count} ranks {text}" for text, count in said.most_common(3)
        )
