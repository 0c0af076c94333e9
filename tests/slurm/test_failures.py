"""Jobs that must fail: at once where a user has to act, and not for ever where a machine may be at fault."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.client import Cluster
from tests.slurm.training import processes, training_flags

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def submit(repo_root: Path, tiny_shards: Path, tmp_path: Path) -> Callable[..., str]:
    """Submit slurm/train_resnet50.sh into tmp_path/run, with more words for sbatch and for training."""

    def call(
        cluster: Cluster, options: list[str], words: list[str], env: dict[str, str] | None = None
    ) -> str:
        script = repo_root / "slurm/train_resnet50.sh"
        return cluster.sbatch(
            *options, script, *training_flags(tiny_shards, tmp_path / "run"), *words, env=env
        )

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.rate", "1"], "optim.rate"),
        # Preflight does not look at it.
        pytest.param(["--resume", "nowhere.pt"], "nowhere.pt", marks=pytest.mark.slow),
    ],
    ids=["found by preflight", "found by training"],
)
def test_a_users_error_is_said_in_a_line_and_never_requeued(
    slurm: Cluster, submit: Callable[..., str], words: list[str], message: str
) -> None:
    job = submit(slurm, [], words)
    assert slurm.wait(job) == "FAILED"
    log = slurm.log(job)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], log
    assert "Traceback" not in log
    fields = slurm.job(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0")


def test_a_job_without_a_gpu_ends_in_a_line_where_one_is_needed(
    slurm: Cluster, submit: Callable[..., str]
) -> None:
    job = submit(slurm, [], [], {"TELLTALE_NEED_GPU": "1"})
    assert slurm.wait(job) == "FAILED"
    errors = [line for line in slurm.log(job).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: no GPU on {slurm.nodes[0]}: "), slurm.log(job)
    assert (slurm.job(job)["ExitCode"], slurm.job(job)["Restarts"]) == ("2:0", "0")


@pytest.mark.slow
def test_a_crash_is_tried_again_as_often_as_the_cap_says(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit(slurm, [], [], {"TELLTALE_CRASH_REQUEUES": "1", "TELLTALE_MAX_RESTARTS": "0"})
    for restart in range(2):
        slurm.wait_log(job, f"restart {restart}: {tmp_path / 'run'}: 1 x 1 processes")
        slurm.until(lambda: processes(slurm, "launch/train.py"), "the training", job)
        for pid in processes(slurm, "launch/train.py"):
            os.kill(pid, signal.SIGKILL)
        slurm.wait_log(job, f"restart {restart}: crashed")
    assert slurm.wait(job) == "FAILED"
    assert slurm.restarts(job) == 1
    assert "not requeued: 2 crashes without a new checkpoint" in slurm.log(job)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_data_is_named_before_training(
    slurm: Cluster, submit: Callable[..., str], tiny_shards: Path
) -> None:
    if slurm.nodes[1] != "n2" or os.geteuid() != 0:
        pytest.skip("needs nodes with mounts of their own: root, iproute2 and util-linux")
    on_second = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={slurm.nodes[1]}"]
    slurm.run(*on_second, "mount", "-t", "tmpfs", "none", tiny_shards)
    try:
        job = submit(slurm, ["--nodes=2"], [])
        assert slurm.wait(job) == "FAILED"
    finally:
        slurm.run(*on_second, "umount", tiny_shards)
    log = slurm.log(job)
    assert "error: n2: " in log or "not there on n2" in log, log
    assert not processes(slurm, "launch/train.py") and "step 1/" not in log
    assert slurm.job(job)["ExitCode"] == "2:0"
