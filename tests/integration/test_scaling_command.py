"""The command that measures the order at scale: it runs the real code on folders that only look large."""

import json
import subprocess
import sys

import pytest

from tests.support import environment


def scaling(repo_root, tmp_path, *words):
    line = [sys.executable, str(repo_root / "launch/scaling.py"), *words]
    return subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)


def test_a_whole_start_is_measured_on_a_folder_of_holes(repo_root, tmp_path):
    words = ["--samples", "5000", "--samples-per-shard", "100", "--whole", "set", "--output", "found.json"]
    done = scaling(repo_root, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == 5000 and found["shards"] == 50
    assert found["shards_in_first_step"] >= 16
    assert 0 < found["open_seconds"] <= found["whole_start_seconds"]
    assert len(list((tmp_path / "set" / "train").glob("*.tar"))) == 50


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0"], "--ranks is 0"),
        (["--samples", "5"], "--samples is 5"),
        (["--samples", "5000", "--whole", "/dev/null/x"], "--whole /dev/null/x"),
    ],
)
def test_a_mistake_is_named(repo_root, tmp_path, words, said):
    done = scaling(repo_root, tmp_path, *words)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]
