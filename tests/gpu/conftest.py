"""Tests of the GPU run beside each other (`pytest tests/gpu -n 4`), but for those that must be alone."""

from collections.abc import Iterator

import pytest

from tests.gpu_turns import turn


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    # Of all workers of pytest-xdist: each has a folder of its own below the session's.
    folder = base.parent if hasattr(request.config, "workerinput") else base
    with turn(folder, alone=request.node.get_closest_marker("alone_on_gpu") is not None):
        yield
