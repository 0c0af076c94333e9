"""launch/train.py as a user runs it: killed, stopped, repeated, and given bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from dataio.shards.shard_set import ShardSet
from engines.train.schedule import data_fingerprint
from tests.runs import assert_same, lines, outcome
from tests.support import alive, command_line, descendants, environment, flags, wait_until
from tests.wandb_file import read_wandb_file

KILLED_AT = 5


def train(tiny_shards, folder, **changes):
    return flags(**{"data__shards": tiny_shards, "run__dir": folder, "checkpoint__every": 3, **changes})


def start_and_wait(command: list[str], folder: Path, step: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: any(line["step"] >= step for line in lines(folder)), 120, f"step {step}")
    return process


def workers_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The training processes below a torchrun."""
    pids = descendants(launcher.pid)
    return [pid for pid in pids if any("launch/train.py" in word for word in command_line(pid))]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def undisturbed(request, tiny_shards, torchrun, tmp_path_factory):
    """A run that nobody disturbed, for each number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = torchrun(request.param, "launch/train.py", *train(tiny_shards, folder))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return request.param, folder, done.stdout


def test_a_run_leaves_what_the_interface_promises(undisturbed):
    _, folder, output = undisturbed
    assert outcome(folder) == {"code": 0, "message": "finished 10 steps"}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "best.pt", "final.safetensors"} <= set(
        os.listdir(folder)
    )
    assert sorted(os.listdir(folder / "checkpoints")) == ["step_00000009.pt", "step_00000010.pt"]
    steps = [line["step"] for line in lines(folder) if line["kind"] == "train"]
    assert steps == list(range(1, 11))
    assert [line["step"] for line in lines(folder) if line["kind"] == "val"] == [7, 10]
    assert "the last" in output and "images of each epoch dropped" in output


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("everything", marks=pytest.mark.slow),
        "launcher",
        pytest.param("one rank", marks=pytest.mark.slow),
    ],
)
def test_killed_in_mid_epoch_and_run_again_gives_the_same_bits(
    undisturbed, victim, tiny_shards, torchrun, tmp_path
):
    processes, reference, _ = undisturbed
    folder = tmp_path / "run"
    command = torchrun(processes, "launch/train.py", *train(tiny_shards, folder))
    launcher = start_and_wait(command, folder, KILLED_AT)
    # Written in the background: the step may be logged before its checkpoint is there.
    wait_until(lambda: any((folder / "checkpoints").glob("step_*.pt")), 60, "a whole checkpoint")
    workers = workers_of(launcher)
    assert len(workers) == processes
    victims = {"everything": [launcher.pid, *workers], "launcher": [launcher.pid], "one rank": workers[-1:]}
    for pid in victims[victim]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait(timeout=60)
    # No orphan may race the rerun.
    wait_until(lambda: not any(map(alive, workers)), 10, "the workers' end")
    assert not (folder / "final.safetensors").exists()
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stdout + again.stderr[-3000:]
    assert "continuing after step" in again.stdout
    assert_same(folder, reference)


@pytest.mark.parametrize("how", ["file", pytest.param("signal", marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves_at_a_common_step_and_continues(
    undisturbed, how, tiny_shards, torchrun, tmp_path
):
    processes, reference, _ = undisturbed
    folder = tmp_path / "run"
    command = torchrun(processes, "launch/train.py", *train(tiny_shards, folder, checkpoint__every=100))
    launcher = start_and_wait(command, folder, 2)
    if how == "file":
        (folder / "stop").touch()
    else:
        os.kill(workers_of(launcher)[-1], signal.SIGUSR1)
    launcher.wait(timeout=60)
    assert outcome(folder)["code"] == 75 and "run the same command to continue" in outcome(folder)["message"]
    assert not (folder / "stop").exists()
    saved = sorted(os.listdir(folder / "checkpoints"))
    assert len(saved) == 1 and 2 <= int(saved[0][5:13]) < 10
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stdout + again.stderr[-3000:]
    assert_same(folder, reference)


def test_a_finished_run_says_so_and_a_changed_one_is_refused(undisturbed, tiny_shards, run, repo_root):
    _, folder, _ = undisturbed
    weights = (folder / "final.safetensors").read_bytes()
    command = [sys.executable, str(repo_root / "launch" / "train.py")]
    # One process continues what several began.
    again = run([*command, *train(tiny_shards, folder)])
    assert again.returncode == 0 and "already finished at step 10" in again.stdout
    changed = run([*command, *train(tiny_shards, folder, optim__lr=0.5)])
    assert changed.returncode == 2
    assert changed.stderr.splitlines()[-1].startswith(
        "error: optim.lr is 0.5, but this run was started with 0.005"
    )
    assert "Traceback" not in changed.stderr
    assert outcome(folder)["code"] == 2
    # What the message says: the run's own configuration continues it, whatever the defaults are now.
    [kept] = re.findall(r"--config (\S+) without flags", changed.stderr)
    again = run([*command, "--config", kept])
    assert again.returncode == 0 and "already finished at step 10" in again.stdout
    assert (folder / "final.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_two_runs_on_one_folder_never_mix(tiny_shards, repo_root, tmp_path):
    command = [sys.executable, str(repo_root / "launch" / "train.py"), *train(tiny_shards, tmp_path / "run")]
    first = start_and_wait(command, tmp_path / "run", 1)
    os.kill(first.pid, signal.SIGSTOP)
    second = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(12)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert second.poll() is None  # it waits for the lock
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, output + errors
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "train"] == list(range(1, 11))


@pytest.mark.slow
def test_weights_and_biases_offline_is_second_to_the_local_log(tiny_shards, repo_root, run, tmp_path):
    pytest.importorskip("tensorboard")
    more = {"log__wandb": "offline", "log__artifacts": "true", "log__tensorboard": "true"}
    command = [sys.executable, str(repo_root / "launch" / "train.py")]
    done = run([*command, *train(tiny_shards, tmp_path / "run", train__steps=2, **more)])
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 2]
    file = read_wandb_file(tmp_path / "run" / "wandb")
    train_lines = [line for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert file.values("train/loss") == pytest.approx({line["step"]: line["loss"] for line in train_lines})
    assert file.config["data_digest"] == data_fingerprint(ShardSet(tiny_shards, "train"))
    assert (file.run.job_type, file.exit_code, file.alerts) == ("training", 0, [])
    assert {entry.path for artifact in file.artifacts for entry in artifact.manifest.contents} == {
        "manifest.json",
        "best.pt",
        "final.safetensors",
    }
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_an_alert(tiny_shards, repo_root, run, tmp_path):
    command = [sys.executable, str(repo_root / "launch" / "train.py")]
    more = {"optim__lr": 1e30, "optim__warmup": 0}
    done = run([*command, *train(tiny_shards, tmp_path / "run", log__wandb="offline", **more)])
    assert done.returncode == 2 and "not finite" in done.stderr
    file = read_wandb_file(tmp_path / "run" / "wandb")
    assert [(title, level) for title, _, level in file.alerts] == [("run: not finite", "ERROR")]
    assert "the loss or its gradient is not finite" in file.alerts[0][1] and file.exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.rate", "1"], "--optim.rate"),
        (["--data.shards", "nowhere", "--data.synthetic.images", "0"], "nowhere: no such folder of shards"),
        (["--train.micro_batch", "5"], "expected a multiple of train.micro_batch, 5"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tiny_shards, repo_root, run, tmp_path, words, message):
    base = [sys.executable, str(repo_root / "launch" / "train.py"), *train(tiny_shards, tmp_path / "run")]
    done = run([*base, *words])
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("metrics.jsonl"))


def test_under_torchrun_a_users_error_is_in_exit_json(tiny_shards, torchrun, run, tmp_path):
    done = run(torchrun(5, "launch/train.py", *train(tiny_shards, tmp_path / "run")))
    assert done.returncode == 1  # torchrun's own
    found = outcome(tmp_path / "run")
    assert found["code"] == 2
    assert found["message"].startswith("5 processes, but train.global_batch 16 has only 4 micro-batches")
    assert done.stderr.count("error: 5 processes, but train.global_batch") == 1


@pytest.mark.slow
def test_a_run_that_stops_early_is_finished_and_keeps_the_averaged_weights(
    run, torchrun, tiny_shards, tmp_path
):
    options = {"train__epochs": 9, "train__ema": 0.5, "log__images": 4, "train__early_stop": 2}
    words = train(tiny_shards, tmp_path / "run", **options, train__early_stop_threshold=0.99)
    command = torchrun(1, "launch/train.py", *words)
    done = run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    # The first validation is the best so far; the two after it are not 99 % better.
    assert "stopped early after 21 of at most 63 steps: 2 validations without improvement" in done.stdout
    assert outcome(tmp_path / "run") == {"code": 0, "message": "stopped early after 21 of at most 63 steps"}
    newest = torch.load(tmp_path / "run" / "checkpoints" / "step_00000021.pt", weights_only=True)
    final = load_file(tmp_path / "run" / "final.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in newest["ema"].items())
    assert not all(torch.equal(final[name], tensor) for name, tensor in newest["model"].items())
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["model"].keys() == newest["ema"].keys() and "ema" not in best
    pictures = sorted(path.name for path in (tmp_path / "run" / "images").iterdir())
    assert pictures == ["confusion.png", "curves.png", "inputs.png", "mistakes.png"]
    again = run(command)
    assert again.returncode == 0 and "already finished at step 21" in again.stdout


@pytest.mark.slow
def test_initial_weights_are_listed_in_the_runs_folder(run, torchrun, tiny_shards, tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet18().state_dict()
    torch.save({name: t for name, t in source.items() if name != "conv1.weight"}, tmp_path / "part.pth")
    torch.save(source, tmp_path / "resnet18.pth")
    words = train(tiny_shards, tmp_path / "run", train__steps=1, model__stem="imagenet")
    done = run(torchrun(1, "launch/train.py", *words, "--model.weights", str(tmp_path / "resnet18.pth")))
    assert done.returncode == 0 and "120 tensors loaded, dropped from the file: backbone.fc" in done.stdout
    listed = (tmp_path / "run" / "weights.txt").read_text()
    assert "  backbone.layer4.1.conv2.weight\n" in listed and "2 dropped from the file" in listed
    other = train(tiny_shards, tmp_path / "other", train__steps=1, model__stem="imagenet")
    done = run(torchrun(1, "launch/train.py", *other, "--model.weights", str(tmp_path / "part.pth")))
    assert (
        done.returncode == 1 and "1 tensors of the backbone are missing, backbone.conv1.weight" in done.stderr
    )
