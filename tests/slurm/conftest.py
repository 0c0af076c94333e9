"""A real SLURM cluster of two nodes, for all tests of this folder; a skip where there is no SLURM."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.client import Cluster
from tests.cluster.namespaces import INSTALL, missing_programs


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Slurm's programs; SLURM_TESTS=require makes their absence a failure."""
    if missing := missing_programs():
        message = f"no SLURM here ({', '.join(missing)} not found): {INSTALL}"
        if os.environ.get("SLURM_TESTS") == "require":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def started_slurm(slurm_programs: None) -> Iterator[Cluster]:
    cluster = Cluster()
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
