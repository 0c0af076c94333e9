"""Commands as a user starts them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import environment


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command to its end in an empty folder, capturing what it prints."""

    def call(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=timeout
        )

    return call
