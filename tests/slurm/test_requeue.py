"""Trainings that are warned, requeued, preempted or lose a node: the same bits as if undisturbed."""

import re
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


def continued_after(cluster: Cluster, job: str) -> list[int]:
    """The steps after which the job's restarts continued."""
    return [int(step) for step in re.findall(r"continuing after step (\d+)", cluster.log(job))]


def assert_stopped_at_once(cluster: Cluster, job: str, folder: Path, seen: int) -> None:
    """Nothing was lost that was there when the warning came, and nothing was computed twice."""
    [saved] = continued_after(cluster, job)
    # The step that was under way, and the one after it: ranks look at most twice a second.
    assert seen <= saved <= seen + 2
    assert computed_steps(cluster, job) == ALL == steps(folder)


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
def test_a_job_warned_in_its_preflight_is_requeued_and_trains_as_two_local_processes(
    slurm: Cluster, submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    job = submit(slurm, *TWO_NODES)
    slurm.until(lambda: processes(slurm, "launch/preflight.py"), "preflight", job)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert slurm.restarts(job) == 1 and "stopped before it began; requeued" in slurm.log(job)
    assert computed_steps(slurm, job) == ALL
    assert_same(tmp_path / "run", undisturbed)


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
def test_requeued_unwarned_without_a_node_and_cancelled_it_ends_with_the_same_bits(
    slurm: Cluster, submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, *TWO_NODES, checkpoint__every=2)
    wait_for_step(slurm, job, folder, 3)
    with held(slurm):  # so they cannot react: what is left is the last checkpoint
        slurm.run("scontrol", "requeue", job)
        slurm.wait_log(job, "restart 1: job")
    slurm.until(lambda: len(continued_after(slurm, job)) == 1, "the first continuation", job)
    wait_for_step(slurm, job, folder, 7)
    with held(slurm):
        slurm.kill_node(slurm.nodes[1])
        slurm.wait(job, ["PENDING"])
        slurm.start_node(slurm.nodes[1])
        slurm.wait_log(job, "restart 2: job")
    slurm.until(lambda: len(continued_after(slurm, job)) == 2, "the second continuation", job)
    wait_for_step(slurm, job, folder, 11)
    with held(slurm):
        slurm.run("scancel", job)
        assert slurm.wait(job) == "CANCELLED"
    again = submit(slurm, *TWO_NODES, checkpoint__every=2)
    assert slurm.wait(again) == "COMPLETED", slurm.log(again)
    assert slurm.state(job) == "CANCELLED" and slurm.restarts(job) == 2
    assert len(continued_after(slurm, again)) == 1
    # Computed again were the steps since a checkpoint, and the log has each step once all the same.
    done = computed_steps(slurm, job, again)
    assert sorted(set(done)) == ALL == steps(folder) and len(done) <= len(ALL) + 3 * 3
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_preempted_by_an_urgent_job_it_continues_afterwards(
    slurm: Cluster, submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    job = submit(slurm, *TWO_NODES, "--partition=preempt")
    wait_for_step(slurm, job, tmp_path / "run", 4)
    with held(slurm):
        seen = steps(tmp_path / "run")[-1]
        urgent = slurm.sbatch("-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1")
        slurm.wait_log(job, "warned: asking")
    assert slurm.wait(urgent) == "COMPLETED"
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert slurm.restarts(job) == 1
    assert_stopped_at_once(slurm, job, tmp_path / "run", seen)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_preemption_that_only_sends_term_to_the_steps(
    slurm_with: Callable[..., Cluster], submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    slurm = slurm_with("--preempt-term")
    job = submit(slurm, *TWO_NODES, "--partition=preempt")

    def preempt() -> None:
        urgent = slurm.sbatch("-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1")
        assert slurm.wait(urgent) == "COMPLETED"

    slurm.until(lambda: processes(slurm, "launch/preflight.py"), "preflight", job)
    preempt()
    slurm.wait_log(job, "stopped before it began; requeued")
    wait_for_step(slurm, job, tmp_path / "run", 4)
    seen = steps(tmp_path / "run")[-1]
    preempt()
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert slurm.restarts(job) == 2
    [saved] = continued_after(slurm, job)
    assert seen <= saved and computed_steps(slurm, job) == ALL
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_under_cgroups_as_on_real_clusters(
    slurm_with: Callable[..., Cluster], submit: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    freezer = Path("/sys/fs/cgroup/freezer")
    probe = freezer / "telltale-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        pytest.skip(
            f"{freezer} cannot be written ({error.strerror}): needs root and cgroup v1 with the freezer mounted"
        )
    slurm = slurm_with("--proctrack", "cgroup")
    job = submit(slurm, *TWO_NODES)
    wait_for_step(slurm, job, tmp_path / "run", 4)
    with held(slurm):
        seen = steps(tmp_path / "run")[-1]
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        slurm.wait_log(job, "warned: asking")
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert slurm.restarts(job) == 1
    assert_stopped_at_once(slurm, job, tmp_path / "run", seen)
    assert_same(tmp_path / "run", undisturbed)
