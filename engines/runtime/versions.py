"""Which code runs: the commit, and the versions of installed packages."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.runtime.paths import ROOT


def commit_of(folder: Path = ROOT) -> str:
    """The code's commit, with "+" where files differ from it; "" outside of a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
