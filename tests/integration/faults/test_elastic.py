"""Killed and continued on another number of processes, in mid-epoch: the same samples and crops."""

import pytest

from tests.integration.faults.harness import Run, ended_well

# Small steps, so that rounding, which depends on the number of processes, does not grow.
# Checkpoints are written by the training itself, or a kill one step later may come first.
STEADY: dict[str, object] = {"optim__lr": 1e-5, "mix__mixup": 0.0, "checkpoint__background": "false"}


@pytest.mark.slow
def test_two_then_one_then_three_processes_train_as_two_do(tiny_shards, disturbed, tmp_path):
    reference, run = Run(tmp_path / "two", tiny_shards, STEADY), disturbed(**STEADY)
    ended_well(reference.go(2))
    assert run.go(2, "kill_all@step.begin:step=4,rank=0").returncode != 0
    assert run.checkpoints() == [3]
    alone = run.go(1, "kill_all@step.begin:step=8,rank=0")
    assert alone.returncode != 0 and "continuing after step 3" in alone.stdout
    assert run.checkpoints() == [3, 6]
    three = run.go(3)
    ended_well(three)
    assert "continuing after step 6" in three.stdout and "3 x cpu" in three.stdout
    # Steps 4, 7 and 8 were seen twice, on different numbers of processes.
    assert run.batches() == reference.batches()
    found, expected = run.lines(), reference.lines()
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    losses, expected_losses = ([line["loss"] for line in lines] for lines in (found, expected))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    # A batch has four micro-batches: five processes are refused, and nothing is lost.
    refused = run.go(5)
    assert refused.returncode != 0
    assert "use at most 4 processes" in run.outcome()["message"]
    assert run.lines() == found
