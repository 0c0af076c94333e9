"""The Triton kernels on the CPU: in Triton's interpreter, and compiled for a GPU that is not there."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for Linux")


def test_the_kernels_in_tritons_interpreter(repo_root):
    # Triton reads the variable when it is imported, which another test may have done already.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "tests/models/detector/norms/interpreted_norms.py",
        ],
        cwd=repo_root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-500:]  # none skipped
