"""Fixtures that every test may use."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dataio.core.log import log_to_console
from tests.support import write_tiny_shards

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _messages() -> None:
    """Show the library's messages as the commands do, so that tests can read them."""
    log_to_console()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that is not part of the repository."""
    path = Path(os.environ.get("TELLTALE_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "genimage-mini").is_dir():
        pytest.skip(
            f"real images not found at {path}: set TELLTALE_DATA to the folder that holds genimage-mini/"
        )
    return path


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 130 images of 32 px in small shards; two in three objects unknown, unevenly."""
    return write_tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def more_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 images of 32 px."""
    from tests.trainers import write_more_shards

    return write_more_shards(tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="session")
def torchrun(repo_root: Path) -> Callable[..., list[str]]:
    """The command line of a torchrun with this many processes on its own port."""

    def command(processes: int, script: str, *words: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            str(repo_root / script),
            *words,
        ]

    return command
