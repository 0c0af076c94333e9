"""Trainings on the test cluster: submitted, held at a step, and looked at."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.client import Cluster
from tests.cluster.processes import descendants
from tests.runs import steps
from tests.support import flags

EPOCHS = 2  # of 7 steps


def training_flags(shards: Path, folder: Path, **changes: object) -> list[str]:
    """A tiny training of 14 steps that saves only when it is told to stop, and at its end."""
    settings = {
        "data__shards": shards,
        "run__dir": folder,
        "train__epochs": EPOCHS,
        "checkpoint__every": 100,
    }
    return flags(**{**settings, **changes})


def processes(cluster: Cluster, script: str, *words: str) -> list[int]:
    """The jobs' Python processes that run a script, and have these words among its arguments."""
    found = []
    for pid in descendants(cluster.process.pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            arguments = [word for word in command[1:] if word != "-u"]
            if "python" in command[0] and arguments[:1] == [script] and set(words) <= set(arguments):
                found.append(pid)
    return found


@contextlib.contextmanager
def held(cluster: Cluster, script: str = "launch/train.py", *words: str) -> Iterator[list[int]]:
    """Stop a script's processes while something is done to their job; the killed stay killed."""
    pids = processes(cluster, script, *words)
    assert pids, f"no process of {script} {' '.join(words)} runs"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    cluster.until(lambda: steps(folder)[-1:] >= [step], f"step {step} in {folder}", job)


def computed_steps(cluster: Cluster, *jobs: str) -> list[int]:
    """The steps that were computed, as the jobs' output tells; one that was computed twice is there twice."""
    printed = "".join(cluster.log(job) for job in jobs)
    return [int(step) for step in re.findall(r"^step (\d+)/\d+ epoch", printed, re.MULTILINE)]
