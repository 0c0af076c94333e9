"""What a benchmark is made of: groups of cases, their settings, runs and results."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from engines.benchmark.roofline import Limits


@dataclass(frozen=True)
class BenchmarkSettings:
    """What all cases of a benchmark share.

    Attributes:
        folder: of the data, made by `draw_images`. device: "cpu" or "cuda".
        images, small: how many images of 256 px and of 32 px. workers: processes or threads.
        seconds: the least duration of a run.
        limits: the device's measured peak rates, if known.
    """

    folder: str
    device: str = "cpu"
    images: int = 600
    small: int = 4000
    workers: int = 2
    batch: int = 64
    seconds: float = 1.5
    limits: Limits | None = None


@dataclass(frozen=True)
class Run:
    """One run: images done, seconds of wall time, bytes read or written, and other figures.

    `untimed` images were done before the clock started; their processor time counts.
    """

    images: int
    seconds: float
    bytes: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    untimed: int = 0


# A case: a context made from the settings that yields a function for one run.
Case = Callable[[BenchmarkSettings], AbstractContextManager[Callable[[], Run]]]


class Unavailable(Exception):
    """A case cannot run here (a missing package, a GPU that is too small); the group runs without it."""


@dataclass(frozen=True)
class Group:
    """Cases that do the same work; the first is telltale's.

    Attributes:
        alone: on a GPU, a case's process ends before the next starts, since memory holds only one.
    """

    name: str
    what: str
    unit: str
    cases: dict[str, Case]
    alone: bool = False


@dataclass
class Result:
    """The results of a case; rates in the group's unit per second, memory in MiB."""

    group: str
    case: str
    unit: str
    cold: float
    rates: list[float]
    megabytes_per_second: float
    cpu_seconds_per_image: float
    peak_mib: float
    extra: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


# Batches that a paused loader has ready (two workers, two each), and one in the making.
READY = 5


def timed(work: Callable[[], int], seconds: float, *, ready: int = 0) -> tuple[int, float]:
    """Repeat `work`, which returns how many images it did, until this much time has passed.

    Args:
        ready: calls before the clock starts, as many as were prepared in advance.

    Returns:
        images, seconds.
    """
    for _ in range(ready):
        work()
    if ready and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    done, begin = 0, time.perf_counter()
    while True:
        done += work()
        passed = time.perf_counter() - begin
        if passed >= seconds:
            return done, passed
