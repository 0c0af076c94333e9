"""`telltale train --processes 2` starts its processes; --gpus and --processes are checked."""

import signal
import subprocess
import sys

import pytest

from dataio.core.errors import UserError
from engines.runtime.launcher import count_processes, under_launcher
from launch.train import main
from tests.runs import lines, outcome
from tests.support import environment, flags, wait_until


@pytest.fixture
def command(tiny_shards, tmp_path):
    folder = tmp_path / "run"
    words = flags(data__shards=tiny_shards, run__dir=folder, checkpoint__every=3, train__steps=12)
    return [sys.executable, "-m", "telltale", "train", "--processes", "2", *words], folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_are_stopped_by_a_signal_and_continue(command, repo_root):
    words, folder = command
    process = subprocess.Popen(
        words, cwd=repo_root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: any(line["step"] >= 1 for line in lines(folder)), 280, "step 1")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert b"Traceback" not in err and process.returncode == 75
    assert b"(SIGTERM); run the same command to continue" in out
    assert outcome(folder)["code"] == 75
    done = subprocess.run(
        words, cwd=repo_root, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and "continuing after step" in done.stdout
    assert outcome(folder)["code"] == 0


def test_what_the_ranks_refuse_is_the_last_line_and_code_2(command, repo_root, tmp_path):
    words, folder = command
    words = [*words, "--data.shards", str(tmp_path / "none"), "--data.synthetic.images", "0"]
    done = subprocess.run(
        words, cwd=repo_root, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert outcome(folder)["code"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "x"], "gpus x: expected all, or a number"),
        (["--gpus", "0"], "gpus 0: expected all, or a number"),
        (["--processes", "0"], "processes 0: expected 1 or more"),
        (["--processes", "two"], "--processes: "),
        (["--gpu", "2"], "did you mean --gpus"),
        (["--gpus", "1", "--processes", "1"], "give one of them"),
    ],
)
def test_wrong_numbers_of_processes_are_refused(words, message, monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_rank_does_not_start_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a launcher has started this process already"):
        main(["--gpus", "2"])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),  # a batch script
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --pty bash
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, True),
    ],
)
def test_a_launcher_is_recognized(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert under_launcher() is expected


def test_gpus_are_counted():
    import torch

    available = torch.cuda.device_count()
    assert count_processes("all", lambda n: True) == max(1, available)
    assert count_processes("all", lambda n: False) == 1
    with pytest.raises(UserError, match=f"gpus {available + 1}: this machine has"):
        count_processes(str(available + 1), lambda n: True)
