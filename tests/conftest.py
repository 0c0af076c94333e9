"""Fixtures that every test may use."""

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dataio.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.manifest import ManifestLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.shards import write_shards

ROOT = Path(__file__).resolve().parent.parent


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
    folder = tmp_path_factory.mktemp("tiny")
    write_synthetic(folder / "source", images=160, size=32, seed=3)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "generator", "object", "split"])
        for number, record in enumerate(GenImageLayout(folder / "source", val_fraction=0.1).records()):
            known = number % 3 == 0 and record.generator == "nature"
            writer.writerow([record.path, record.generator, record.object if known else "", record.split])
    layout = ManifestLayout(folder / "list.csv", root=folder / "source")
    write_shards(layout, folder / "shards", preset_policy("default", 32), samples_per_shard=20, quiet=True)
    return folder / "shards"


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
