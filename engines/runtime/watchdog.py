"""Who died, who hangs: every process says now and then how far it is, and looks at the others.

A process that dies breaks its connections, and the others' collectives fail at once. One that
hangs breaks nothing: the others wait. So a thread of each process watches its own progress,
and after `train.timeout` without any it names, by what all of them said, the one that is
behind, and ends its process; the launcher ends the rest. On a GPU the host runs ahead of its
device, and a kernel that hangs is behind no one: then no rank is named.
"""

import contextlib
import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from engines.runtime.distributed import World
from engines.runtime.rendezvous import run_store

TICK_SECONDS = 0.5
# A process that has said nothing for so many ticks has ended (or its machine has).
SILENT_TICKS = 4
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection|[Tt]imed out")


class LostRankError(Exception):
    """Another process of the run has ended or cannot be reached."""


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


@dataclass(frozen=True)
class Progress:
    """How far a process is: compared in this order.

    Attributes:
        step: steps done. stage: 0 after the last of them, 1 validating, 2 in the next. count: beats within.
    """

    step: int = 0
    stage: int = 0
    count: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        return self.step, self.stage, self.count


class HangWatchdog:
    """A process's progress, published to the launcher's store and watched.

    Args:
        world: the processes. timeout_minutes: without progress, 0 for never.
        on_hang: is given the message, writes what must be written; then the process ends.
    """

    def __init__(self, world: World, timeout_minutes: float, on_hang: Callable[[str], None]) -> None:
        self._world, self._timeout, self._on_hang = world, 60 * timeout_minutes, on_hang
        self._progress = Progress()
        self._changed, self._count = False, 0
        self._tick = max(TICK_SECONDS, world.size / 500)  # the store is one process
        self._store = self._connect()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._publish()
        self._thread.start()

    def beat(self, step: int, stage: int = 2) -> None:
        """Say that this process goes on; costs next to nothing."""
        now = self._progress
        again = (step, stage) == (now.step, now.stage)
        self._progress = Progress(step, stage, now.count + 1 if again else 0)
        self._changed = True

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def diagnose(self) -> str:
        """Which ranks have ended, by their silence of a few seconds, and how far they were."""
        if self._store is None:
            return "a connection was lost"
        before = self._everybody()
        with contextlib.suppress(dist.DistError):
            if self._store.check(["hangs"]):  # who left had said why
                return self._store.get("hangs").decode()
        time.sleep(SILENT_TICKS * self._tick)
        after = self._everybody()
        silent = [
            f"rank {rank} on {said['host']} has ended or lost its connection, last heard of at step {said['step']}"
            for rank, said in sorted(after.items())
            if said["count"] == before.get(rank, {}).get("count")
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
        return run_store(f"{self._world.name}/heartbeat", store)

    def _publish(self) -> None:
        if self._store is None:
            return
        said = {"step": self._progress.step, "place": self._progress.place, "host": socket.gethostname()}
        self._count += 1
        with contextlib.suppress(dist.DistError):  # a store that went away is the launcher's end
            self._store.set(str(self._world.rank), json.dumps({**said, "count": self._count}))

    def _everybody(self) -> dict[int, dict[str, Any]]:
        """What every rank said last."""
        found = {}
        with contextlib.suppress(dist.DistError):
            for rank in range(self._world.size):
                if self._store.check([str(rank)]):
                    found[rank] = json.loads(self._store.get(str(rank)))
        return found

    def _watch(self) -> None:
        still, before = 0.0, time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            # A whole process that was suspended does not hang: a tick counts as one at most twice.
            still, before = still + min(now - before, 2 * self._tick), now
            if self._changed:
                still, self._changed = 0.0, False
            self._publish()
            if 0 < self._timeout < still:
                self._end()

    def _end(self) -> None:
        # Twice, so that those that stopped a moment later have said so.
        self._over.wait(2 * self._tick)
        self._publish()
        message = self._name_the_hanging()
        print(f"error: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, dist.DistError):
            self._on_hang(message)
            if self._store is not None:
                self._store.set("hangs", message)
        os._exit(1)

    def _name_the_hanging(self) -> str:
        waited = f"no progress for {self._timeout / 60:g} minutes (train.timeout)"
        everybody = self._everybody()
        places = {rank: tuple(said["place"]) for rank, said in everybody.items()}
        if not places:
            return f"{waited} after step {self._progress.step} on {socket.gethostname()}"
        behind = sorted(rank for rank, place in places.items() if place == min(places.values()))
        if len(behind) == len(places) > 1:
            return f"{waited} after step {self._progress.step}, and no rank is behind the others"
        named = ", ".join(f"rank {rank} on {everybody[rank]['host']}" for rank in behind)
        return f"{waited}: {named} hangs after step {everybody[behind[0]]['step']}"
