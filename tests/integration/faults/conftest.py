"""A run that nobody disturbed, for each number of processes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.integration.faults.harness import Run, ended_well


@pytest.fixture(scope="session")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """The undisturbed run of so many processes."""

    @cache
    def make(processes: int) -> Run:
        run = Run(tmp_path_factory.mktemp("undisturbed") / "run", tiny_shards, {})
        ended_well(run.go(processes))
        return run

    return make


@pytest.fixture
def disturbed(tiny_shards: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run in a new folder, with changes to its settings."""

    def make(**changes: object) -> Run:
        return Run(tmp_path / "run", tiny_shards, changes)

    return make
