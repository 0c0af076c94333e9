"""A real SLURM cluster of two nodes, for all tests of this folder; a skip where none can be had."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster.client import Cluster
from tests.cluster.namespaces import INSTALL, missing_programs
from tests.slurm.training import training_flags
from tests.support import environment


def _without(message: str) -> NoReturn:
    """Skip; SLURM_TESTS=require, which CI sets where a cluster could be started, makes it a failure."""
    if os.environ.get("SLURM_TESTS") == "require":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    if missing := missing_programs():
        _without(f"no SLURM here ({', '.join(missing)} not found): {INSTALL}")


@pytest.fixture(scope="session")
def started_slurm(slurm_programs: None) -> Iterator[Cluster]:
    try:
        cluster = Cluster()
    except RuntimeError as error:
        _without(f"no SLURM cluster can be started here: {error}")
    yield cluster
    cluster.stop()


@pytest.fixture
def slurm(started_slurm: Cluster) -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2; whatever the test leaves is cancelled."""
    yield started_slurm
    started_slurm.clear()


@pytest.fixture
def slurm_with(slurm_programs: None) -> Iterator[Callable[..., Cluster]]:
    """Start a further cluster with options of the kit, for one test."""
    clusters: list[Cluster] = []

    def start(*options: str) -> Cluster:
        clusters.append(Cluster(*options))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.stop()


@pytest.fixture(scope="session")
def undisturbed(
    slurm_programs: None,
    tiny_shards: Path,
    torchrun: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run of two processes on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = torchrun(2, "launch/train.py", *training_flags(tiny_shards, folder))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder
