"""A process whose work is done and that something keeps is ended, with its own exit code."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.runtime import launcher
from engines.runtime.ending import ended_in
from tests.support import environment

KEPT = """
import threading, time
from engines.runtime.command import run_command
def for_ever():
    time.sleep(3600)
def main():
    threading.Thread(target=for_ever, name="uploader").start()
    return {code}
run_command(main, within=1)
"""

# A rank that has finished, as its run's folder says, and goes on.
LINGERING = """
import os, pathlib, sys, time
from engines.runtime.distributed import die_with_launcher
from engines.runtime.exit_file import write_exit
die_with_launcher()
write_exit(pathlib.Path(sys.argv[1]), {code}, "told")
time.sleep({seconds})
"""


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_thread_keeps_is_ended_and_the_thread_is_named(repo_root, code):
    done = subprocess.run(
        [sys.executable, "-c", KEPT.format(code=code)],
        env=environment(),
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert done.stderr.startswith(
        f"warning: the process has not ended in 1 s, and is ended with exit code {code}: "
    )
    assert "uploader in __main__.for_ever, line 5" in done.stderr


def test_what_ends_in_time_is_left_alone():
    with ended_in(0.2, 3, "this"):
        pass
    time.sleep(0.4)


@pytest.mark.parametrize(
    ("code", "seconds", "ended"), [(0, 3600, True), (1, 4, False)], ids=["finished", "failed"]
)
def test_a_launcher_ends_the_ranks_of_a_finished_run_and_no_others(
    tmp_path: Path, repo_root, monkeypatch, capsys, code, seconds, ended
):
    monkeypatch.setattr(launcher, "LEAVE_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    script = tmp_path / "rank.py"
    script.write_text(LINGERING.format(code=code, seconds=seconds))
    begun = time.monotonic()
    assert launcher.launch_processes(script, [str(tmp_path)], 1, tmp_path) == code
    said = capsys.readouterr().err
    assert ("has finished, but its processes have not ended in 1 s" in said) == ended
    assert time.monotonic() - begun > seconds or ended
