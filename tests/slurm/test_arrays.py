"""Sharding as an array: a task that is warned or killed is requeued alone, and the bytes are the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from dataio.layouts.synthetic import write_synthetic
from tests.cluster.client import Cluster
from tests.slurm.training import held, processes
from tests.support import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TASKS = 3


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tasks_are_requeued_alone_and_the_bytes_are_those_of_one_process(
    slurm: Cluster, repo_root: Path, tmp_path: Path
) -> None:
    source, output, reference = (tmp_path / name for name in ("source", "shards", "reference"))
    write_synthetic(source, images=900, size=64, seed=5)
    words = ["--source", str(source), "--samples-per-shard", "10"]
    command = [sys.executable, str(repo_root / "launch/shard.py"), "--layout", "genimage", "--workers", "1"]
    subprocess.run(
        [*command, "--output", str(reference), *words],
        env=environment(),
        check=True,
        capture_output=True,
        timeout=300,
    )
    job = slurm.sbatch(
        f"--array=0-{TASKS - 1}",
        "--cpus-per-task=1",
        repo_root / "slurm/shard_genimage.sh",
        "--output",
        output,
        *words,
    )
    both = [f"{number}/{TASKS}" for number in (0, 1)]
    slurm.until(
        lambda: (
            all(processes(slurm, "launch/shard.py", share) for share in both) and list(output.glob("*/*.tar"))
        ),
        "the first shard",
        job,
    )
    with held(slurm, "launch/shard.py", both[0]), held(slurm, "launch/shard.py", both[1]):
        slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
        slurm.run("scontrol", "requeue", f"{job}_1")
        slurm.until(lambda: slurm.tasks(job)[1]["Restarts"] == "1", "the task to be requeued", job)
    ended = slurm.wait_array(job, TASKS)
    assert {number: task["JobState"] for number, task in ended.items()} == dict.fromkeys(
        range(TASKS), "COMPLETED"
    )
    assert {number: task["Restarts"] for number, task in ended.items()} == {0: "1", 1: "1", 2: "0"}
    found, expected = contents(output), contents(reference)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
