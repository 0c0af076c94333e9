"""A process that dies or hangs ends all, soon, and is named; the command goes on afterwards."""

import os
import pickle
import re
import signal
import socket
import subprocess
import time

import pytest
import torch

from tests.integration.faults.harness import Run, differing, ended_well
from tests.support import alive, descendants, wait_until


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_rank_that_dies_and_one_that_hangs_are_named(undisturbed, disturbed):
    # First rank 1 is killed, then, in what torchrun starts anew by itself, it hangs.
    run: Run = disturbed(train__timeout=0.1)
    faults = "kill@data.next:step=4,rank=1,restart=0; hang@data.next:step=5,rank=1,restart=1"
    done = run.go(2, faults, restarts=2)
    ended_well(done)
    died, *hangs = errors(done)
    host = socket.gethostname()
    assert re.match(
        rf"error: rank 1 on {host} has ended or lost its connection, last heard of at step \d", died
    )
    assert died.endswith("; run the same command to continue")
    # Each that still looks says it.
    assert hangs
    for line in hangs:
        assert line.startswith(
            f"error: no progress for 0.1 minutes (train.timeout): rank 1 on {host} hangs after step 5, in a step, "
            "waiting for data (engines.runtime.fault_injection._hang, line "
        )
        assert line.endswith(f"; the stacks are in {run.folder / 'hang'}")
        assert "; the others: in a step, in " in line
    # What every rank did was written before any was ended.
    waiting, hanging = ((run.folder / "hang" / f"rank{rank}.txt").read_text() for rank in range(2))
    for rank, text in enumerate((waiting, hanging)):
        assert re.match(rf"rank {rank} on {host}, pid \d+, [-\d]+ [:\d]+: after step 5, in a step, ", text)
        assert "Current thread" in text and "(most recent call first)" in text
    assert "in _hang\n" in hanging and "in train_step\n" in hanging
    assert "in _hang\n" not in waiting and "in train_step\n" in waiting
    collectives = [
        pickle.loads((run.folder / "hang" / f"gloo_rank_{rank}").read_bytes()) for rank in range(2)
    ]
    last = [max(record["entries"], key=lambda entry: entry["record_id"]) for record in collectives]
    assert last[0]["record_id"] > last[1]["record_id"]  # rank 0 is in one that rank 1 has not begun
    assert differing(run, undisturbed(2)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["validation.batch:step=7", pytest.param("step.begin:step=9", marks=pytest.mark.long)]
)
def test_a_rank_that_hangs_elsewhere_is_named_in_exit_json(disturbed, point):
    run: Run = disturbed(train__timeout=0.1)
    done = run.go(2, f"hang@{point},rank=1")
    assert done.returncode != 0
    assert run.outcome()["code"] == 1
    assert f"rank 1 on {socket.gethostname()} hangs after step {point[-1]}" in run.outcome()["message"]


@pytest.mark.slow
def test_a_suspended_run_does_not_hang(undisturbed, disturbed):
    run: Run = disturbed(train__timeout=0.1)
    process = run.start(2)
    wait_until(lambda: (run.folder / "metrics.jsonl").is_file() and len(run.lines()) > 1, 120, "step 2")
    everyone = [process.pid, *descendants(process.pid)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)  # longer than train.timeout
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)
    output, said = process.communicate(timeout=200)
    ended_well(subprocess.CompletedProcess(process.args, process.returncode, output, said))
    assert differing(run, undisturbed(2)) == []


@pytest.mark.slow
def test_one_rank_with_a_nan_stops_all_and_skipping_goes_on_from_there(disturbed):
    run: Run = disturbed()
    fault = "nan@step.forward:step=7,rank=1"
    done = run.go(2, fault)
    assert done.returncode != 0 and len(errors(done)) == 1
    assert "step 8: the loss or its gradient is not finite" in run.outcome()["message"]
    assert run.outcome()["code"] == 2 and (run.folder / "nonfinite.json").is_file()
    assert run.checkpoints() == [3, 6]
    run.changes = {"train__nonfinite": "skip"}
    ended_well(run.go(2, fault))
    skipped = [line["skipped"] for line in run.lines() if line["kind"] == "train" and "skipped" in line]
    assert skipped == [0, 1, 1, 1]  # steps 7 to 10
    newest = torch.load(run.folder / "checkpoints" / "step_00000010.pt", weights_only=True)
    assert newest["skipped"] == 1


@pytest.mark.slow
def test_a_full_disk_while_training_costs_checkpoints_but_no_result(undisturbed, disturbed):
    # Written by the training itself, or the kill may come before the warnings.
    run: Run = disturbed(checkpoint__background="false")
    faults = (
        "disk_full@checkpoint.write:step=3; disk_full@metrics.write:step=5; disk_full@best.write:step=7; "
        "kill_all@step.begin:step=8,rank=0"
    )
    done = run.go(2, faults)
    assert done.returncode != 0
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "step_00000003.pt: could not be written (No space left on device)" in warned[0]
    assert "metrics.jsonl: could not be written" in warned[1] and "best.pt" in warned[2]
    assert run.checkpoints() == [6]
    ended_well(run.go(2))
    assert differing(run, undisturbed(2)) == []


@pytest.mark.slow
def test_two_launches_on_one_folder_never_mix(undisturbed, disturbed):
    run: Run = disturbed()
    first, second = run.start(2), run.start(2)
    wait_until(lambda: (run.folder / "metrics.jsonl").is_file() and len(run.lines()) > 4, 200, "step 4")
    workers = descendants(first.pid)
    first.kill()
    first.communicate()
    wait_until(lambda: not any(map(alive, workers)), 20, "the first launch's end")
    output, said = second.communicate(timeout=250)
    ended_well(subprocess.CompletedProcess(second.args, second.returncode, output, said))
    assert differing(run, undisturbed(2)) == []
