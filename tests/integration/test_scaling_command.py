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
    assert found["whole_start_cpu_seconds"] > 0 and found["whole_start_memory_mib"] < 200
    assert len(list((tmp_path / "set" / "train").glob("*.tar"))) == 50


def test_a_set_of_many_shards_is_opened_without_looking_at_each(repo_root, tmp_path):
    """Ten million samples in 25,000 shards, of which only those of the first window are there."""
    words = ["--samples", "10000000", "--samples-per-shard", "400", "--ranks", "64", "--per-rank", "32"]
    done = scaling(repo_root, tmp_path, *words, "--whole", "set", "--output", "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    folder = tmp_path / "set" / "train"
    assert (folder / "shards.npy").is_file() and (folder / "index.npy").stat().st_size > 4e8
    assert (folder.parent / "manifest.json").stat().st_size < 10_000
    assert len(list(folder.glob("*.tar"))) <= 32  # the window's that this process reads
    assert found["whole_start_memory_mib"] < 100


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
