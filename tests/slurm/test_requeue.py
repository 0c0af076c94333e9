"""Trainings that are warned, requeued, preempted or lose a node: the same bits as if undisturbed."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.client import Cluster
from tests.runs import assert_same, steps
from tests.slurm.training import computed_steps, held, processes, training_flags, wait_for_step

# Each start of two trainings on two cores takes some 25 s, mostly imports.
pytestmark = pytest.mark.timeout(1200)

TWO_NODES = ["--nodes=2"]
ALL = list(range(1, 15))


@pytest.fixture
def submit(repo_root: Path, tiny_shards: Path, tmp_path: Path) -> Callable[..., str]:
    """Submit slurm/train_resnet50.sh into tmp_path/run."""

    def call(cluster: Cluster, *options: str, env: dict[str, str] | None = None, **changes: object) -> str:
        words = training_flags(tiny_shards, tmp_path / "run", **changes)
        return cluster.sbatch(*options, repo_root / "slurm/train_resnet50.sh", *words, env=env)

    return call


def submit_urgent(cluster: Cluster) -> str:
    """A short job for which Slurm takes both nodes from the partition preempt."""
    return cluster.sbatch("-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "true")


def continued_after(cluster: Cluster, job: str) -> list[int]:
    """The steps after which the job's restarts continued."""
    return [int(step) for step in re.findall(r"continuing after step (\d+)", cluster.log(job))]


def assert_stopped_at_once(cluster: Cluster, job: str, folder: Path, seen: int) -> None:
    """Nothing was lost that was there when the warning came, and nothing was computed twice."""
    [saved] = continued_after(cluster, job)
    # The step that was under way, and the one after it: ranks look at most twice a second.
    assert seen <= saved <= seen + 2
    assert computed_steps(cluster, job) == ALL == steps(folder)


@pytest.mark.slow
def test_a_warned_job_saves_requeues_itself_and_continues(
    slurm: Cluster, submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    job = submit(slurm, *TWO_NODES)
    wait_for_step(slurm, job, tmp_path / "run", 4)
    with held(slurm) as workers:
        assert len(workers) == 2
        seen = steps(tmp_path / "run")[-1]
        # What --signal=B:USR1@300 does before the limit, but now.
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        slurm.wait_log(job, "warned: asking")
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert slurm.restarts(job) == 1
    assert_stopped_at_once(slurm, job, tmp_path / "run", seen)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_job_warned_before_it_trains_is_requeued_at_once(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit(slurm)
    slurm.until(lambda: processes(slurm, "launch/preflight.py"), "preflight", job)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_log(job, "stopped before it began; requeued")
    slurm.wait_log(job, "restart 1: job")
    assert slurm.restarts(job) == 1 and not (tmp_path / "run/exit.json").exists()


@pytest.mark.slow
def test_the_time_limit_warns_requeues_and_continues(
    slurm: Cluster, submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    # Slurm looks at limits twice a minute, and warns up to a minute before it was told to.
    job = submit(slurm, *TWO_NODES, "--time=1", "--signal=B:USR1@1")
    wait_for_step(slurm, job, tmp_path / "run", 2)
    seen = steps(tmp_path / "run")[-1]
    if "warned" not in slurm.log(job):
        with held(slurm):
            slurm.wait_log(job, "warned: asking")
    slurm.wait_log(job, "restart 1: job")
    assert slurm.call("scontrol", "update", f"jobid={job}", "timelimit=20").returncode == 0
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert "stopped and saved; requeued" in slurm.log(job)
    # Slurm's own end of the limit never came, and no step was computed twice.
    assert "DUE TO TIME LIMIT" not in slurm.log(job)
    assert seen <= continued_after(slurm, job)[-1]
    assert computed_steps(slurm, job) == ALL
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_preempted_requeued_unwarned_without_a_node_and_cancelled_it_ends_with_the_same_bits(
    slurm: Cluster, submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, *TWO_NODES, "--partition=preempt", checkpoint__every=2)
    wait_for_step(slurm, job, folder, 2)
    with held(slurm):
        seen = steps(folder)[-1]
        urgent = submit_urgent(slurm)
        slurm.wait_log(job, "warned: asking")
    assert slurm.wait(urgent) == "COMPLETED"
    slurm.wait_log(job, "continuing after step")
    # A warned job loses nothing.
    assert seen <= continued_after(slurm, job)[0]
    assert computed_steps(slurm, job)[: seen + 1] == ALL[: seen + 1]
    wait_for_step(slurm, job, folder, 5)
    with held(slurm):  # so they cannot react: what is left is the last checkpoint
        slurm.run("scontrol", "requeue", job)
        slurm.wait_log(job, "restart 2: job")
    slurm.until(lambda: len(continued_after(slurm, job)) == 2, "the second continuation", job)
    wait_for_step(slurm, job, folder, 8)
    with held(slurm):
        slurm.kill_node(slurm.nodes[1])
        slurm.wait(job, ["PENDING"])
        slurm.start_node(slurm.nodes[1])
        slurm.wait_log(job, "restart 3: job")
    slurm.until(lambda: len(continued_after(slurm, job)) == 3, "the third continuation", job)
    wait_for_step(slurm, job, folder, 11)
    with held(slurm):
        slurm.run("scancel", job)
        assert slurm.wait(job) == "CANCELLED"
    again = submit(slurm, *TWO_NODES, checkpoint__every=2)
    assert slurm.wait(again) == "COMPLETED", slurm.log(again)
    assert slurm.state(job) == "CANCELLED" and slurm.restarts(job) == 3
    assert len(continued_after(slurm, again)) == 1
    # Computed again were the steps since a checkpoint, and the log has each step once all the same.
    done = computed_steps(slurm, job, again)
    assert sorted(set(done)) == ALL == steps(folder) and len(done) <= len(ALL) + 3 * 3
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_preemption_that_only_sends_term_to_the_steps(
    slurm_with: Callable[..., Cluster], submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    """Under cgroups where the machine allows: there, as on real clusters, only srun's own tasks get it."""
    slurm = slurm_with("--preempt-term", "--proctrack", _strictest_tracking())
    job = submit(slurm, *TWO_NODES, "--partition=preempt")
    slurm.until(lambda: processes(slurm, "launch/preflight.py"), "preflight", job)
    assert slurm.wait(submit_urgent(slurm)) == "COMPLETED"
    assert "stopped before it began; requeued" in slurm.log(job)
    wait_for_step(slurm, job, tmp_path / "run", 4)
    seen = steps(tmp_path / "run")[-1]
    assert slurm.wait(submit_urgent(slurm)) == "COMPLETED"
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert slurm.restarts(job) == 2
    [saved] = continued_after(slurm, job)
    assert seen <= saved and computed_steps(slurm, job) == ALL
    assert_same(tmp_path / "run", undisturbed)


def _strictest_tracking() -> str:
    probe = Path("/sys/fs/cgroup/freezer/telltale-probe")
    try:
        probe.mkdir()
        probe.rmdir()
        return "cgroup"
    except OSError as error:
        warnings.warn(
            f"not tested under cgroups: {probe.parent} cannot be written ({error.strerror}); that needs root and "
            "cgroup v1 with its freezer mounted",
            stacklevel=2,
        )
        return "pgid"
