"""The scripts behind docs/scaling.md and docs/performance.md run at small sizes."""

import subprocess
import sys

from tests.support import environment


def _run(repo_root, tmp_path, script, *words):
    line = [sys.executable, str(repo_root / "docs" / "scaling" / script), *map(str, words)]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_start_is_measured_on_sparse_shards(repo_root, tmp_path):
    """400,000 samples in 20,000 shards, the fewest whose list is a table; only the first window has tars."""
    words = ["--samples", 400_000, "--samples-per-shard", 20, "--ranks", 8, "--per-rank", 32]
    lines = _run(repo_root, tmp_path, "startup.py", tmp_path / "set", *words)
    values = {name: float(value.replace(",", "")) for name, value in map(str.split, lines)}
    assert 0 < values["open_seconds"] <= values["order_and_crops_seconds"] <= values["whole_start_seconds"]
    assert values["whole_start_memory_mib"] < 200
    assert (tmp_path / "set" / "train" / "shards.npy").is_file()
    assert len(list((tmp_path / "set" / "train").glob("*.tar"))) <= 32


def test_sorted_shards_shuffle_worse_than_permuted_ones(repo_root, tmp_path):
    words = ["--samples", 48_000, "--samples-per-shard", 200, "--batch", 100]
    lines = _run(repo_root, tmp_path, "shuffle.py", *words)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    spread = {(row[0], row[1]): float(row[4]) for row in rows[2:]}
    assert rows[0][4] == "generator spread" and len(spread) == 10
    # Five standard errors of 480 batches' mean chi-square of 8 degrees of freedom.
    assert abs(spread["permuted", "1"] - 1) < 5 * (2 / 8 / 480) ** 0.5
    assert spread["sorted", "1"] > 50 > spread["sorted", "16"] > spread["sorted", "all"]


def test_communication_costs_nothing_on_one_gpu_and_more_on_more(repo_root, tmp_path):
    lines = _run(
        repo_root, tmp_path, "communication.py", "--backbone", "resnet18", "--gpus", "1,8,64", "--batch", 64
    )
    assert lines[0].startswith("resnet18: 46.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0] for row in rows] == ["1", "8", "64"] and rows[0][1:3] == ["0.00", "0.00"]
    # Within a node it is the ring: 2 (n-1)/n of the bytes over one link.
    ring = 2 * 7 / 8 * 46.8e6 / 350e9 * 1000
    assert ring < float(rows[1][1]) < 2 * ring < float(rows[2][1])
