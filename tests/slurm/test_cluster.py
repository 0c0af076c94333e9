"""The test cluster itself: what the other tests of this folder rely on."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.client import Cluster
from tests.cluster.processes import descendants, is_zombie
from tests.support import wait_until

SHOW = "echo T $SLURM_NODEID $SLURM_PROCID $SLURMD_NODENAME cuda=$CUDA_VISIBLE_DEVICES"


def submit(cluster: Cluster, *words: object) -> str:
    return cluster.sbatch("--output=test-%j.out", *words)


def test_two_nodes_run_a_task_each_with_fake_gpus(slurm: Cluster) -> None:
    job = submit(
        slurm, "-N2", "--ntasks-per-node=1", "--gpus-per-node=2", "--wrap", f"srun bash -c '{SHOW}; hostname'"
    )
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    lines = slurm.log(job).splitlines()
    tasks = sorted(line for line in lines if line.startswith("T "))
    assert tasks == [f"T {i} {i} {name} cuda=0,1" for i, name in enumerate(slurm.nodes)]
    hosts = sorted(line for line in lines if not line.startswith("T "))
    # With namespaces each node is a machine of its own.
    assert hosts == ["n1", "n2"] or slurm.nodes == ["127.0.0.11", "127.0.0.12"], hosts


@pytest.mark.parametrize("words", [["--gres=gpu:99"], ["-p", "nope"], ["-N9"], ["--mem=9T"]], ids=" ".join)
def test_what_the_cluster_cannot_give_is_refused(slurm: Cluster, words: list[str]) -> None:
    done = slurm.call("sbatch", *words, "--wrap", "true")
    assert done.returncode != 0
    assert "sbatch: error" in done.stderr


def test_killed_node_ends_a_job_that_is_not_to_be_requeued(slurm: Cluster) -> None:
    job = submit(slurm, "-N2", "--wrap", "srun --ntasks-per-node=1 sleep 600")
    slurm.wait(job, ["RUNNING"])
    # The cluster is strict: what does not say --requeue is never requeued.
    assert slurm.call("scontrol", "requeue", job).returncode != 0
    slurm.kill_node(slurm.nodes[1])
    assert slurm.wait(job) == "NODE_FAIL"
    slurm.start_node(slurm.nodes[1])
    again = submit(slurm, "-N2", "--wrap", "srun --ntasks-per-node=1 true")
    assert slurm.wait(again) == "COMPLETED"


def test_arrays_and_dependencies(slurm: Cluster) -> None:
    array = slurm.sbatch(
        "--array=0-2", "--output=test-%A_%a.out", "--wrap", "exit $((SLURM_ARRAY_TASK_ID == 2))"
    )
    never = submit(slurm, f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--wrap", "true")
    other = submit(slurm, f"--dependency=afternotok:{array}", "--wrap", "true")
    assert slurm.wait(other) == "COMPLETED"
    assert slurm.wait(never) == "CANCELLED"
    states = {number: fields["JobState"] for number, fields in slurm.tasks(array).items()}
    assert states == {0: "COMPLETED", 1: "COMPLETED", 2: "FAILED"}


@pytest.mark.parametrize("mode", ["plain", "net"])
def test_cluster_vanishes_with_its_owner(
    slurm_programs: None, mode: str, tmp_path: Path, slurm_with: Callable[..., Cluster]
) -> None:
    from tests.cluster.namespaces import can_isolate

    if mode == "net" and not can_isolate():
        pytest.skip("net mode needs iproute2, util-linux and root or unprivileged user namespaces")
    cluster = slurm_with("--mode", mode)
    job = submit(cluster, "-N2", "--wrap", "srun --ntasks-per-node=1 sleep 600")
    cluster.wait(job, ["RUNNING"])
    family = descendants(cluster.process.pid)
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family]
    assert sum(b"slurmd" in command for command in commands) >= 2
    os.kill(cluster.process.pid, signal.SIGKILL)
    wait_until(lambda: all(is_zombie(pid) for pid in family), 60, "the cluster's processes to end")


def test_command_line_starts_and_stops_a_cluster(slurm_programs: None, repo_root: Path) -> None:
    import tempfile

    kit = repo_root / "tests/cluster/kit.py"

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(kit), *words], capture_output=True, text=True, timeout=120)

    with tempfile.TemporaryDirectory(prefix="telltale-kit-", dir="/tmp") as folder:
        started = call("up", folder, "--nodes", "3", "--gpus", "0", "--mode", "plain")
        assert started.returncode == 0, started.stderr
        try:
            shown = call("run", folder, "--", "sinfo", "-h", "-N", "-o", "%t")
            assert shown.stdout.split() == ["idle"] * 9  # 3 nodes in 3 partitions
            assert "has a running cluster" in call("up", folder).stderr
        finally:
            stopped = call("down", folder)
        assert stopped.returncode == 0, stopped.stderr
        assert "no cluster runs in" in call("run", folder, "--", "sinfo").stderr
