"""The batch scripts as text: bash and shellcheck find nothing to say."""

import shutil
import subprocess
from pathlib import Path

import pytest


def scripts(repo_root: Path) -> list[Path]:
    found = sorted((repo_root / "slurm").glob("*.sh"))
    assert len(found) > 6
    return found


def test_bash_reads_every_script(repo_root: Path) -> None:
    for script in scripts(repo_root):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_shellcheck_finds_nothing(repo_root: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found: apt-get install -y shellcheck")
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts(repo_root)],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
