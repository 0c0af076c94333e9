"""A documentation page as the steps it tells a reader to take."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import environment

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("configs", "dataio", "engines", "launch", "models", "telltale")
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title, text) of each fenced block of docs/`page`, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [(language, title, body) for language, title, body in _FENCE.findall(text)]


def copy_of_the_code(folder: Path) -> Path:
    """A copy of the packages and configurations in which a page's steps may be carried out."""
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    return folder


def run(command: str, folder: Path) -> str:
    """Run a shell command as a reader would; its output, after checking that it succeeded."""
    settings = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    settings |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


def follow(page: str, folder: Path) -> str:
    """Write the page's titled blocks as files, run its other bash blocks, in order; the joined output."""
    output = ""
    for language, title, body in blocks(page):
        if title:
            path = folder / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body, encoding="utf-8")
        elif language == "bash":
            output += run(body, folder)
    return output
