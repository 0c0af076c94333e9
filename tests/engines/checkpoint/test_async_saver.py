"""Saves in the background: the same files, in order, and never lost without a word."""

import subprocess
import sys
import threading

import pytest
import torch

from dataio.core.errors import UserError
from engines.checkpoint import files as checkpoints
from engines.checkpoint.async_saver import Saver, snapshot
from engines.checkpoint.files import FORMAT, VERSION, CheckpointFolder
from engines.runtime import fault_injection as faults


def state(step, **more):
    torch.manual_seed(step)
    weights = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    return {"format": FORMAT, "version": VERSION, "step": step, "model": {"w": weights}, **more}


@pytest.fixture
def saver(tmp_path):
    made = []

    def make(background=True, sync_log=lambda: None):
        store = CheckpointFolder(tmp_path / "checkpoints", keep=2)
        made.append(Saver(store, tmp_path / "best.pt", sync_log, background=background))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def fault(monkeypatch):
    def ask(text):
        monkeypatch.setattr(faults, "_faults", faults.parse_faults(text))

    return ask


def test_a_snapshot_shares_no_memory_and_keeps_the_layout():
    image, count = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.zeros(3)
    copy = snapshot({"a": [image], "b": ({"c": count},)})
    assert copy["a"][0].is_contiguous(memory_format=torch.channels_last)
    image.fill_(7)
    count.fill_(7)
    assert copy["a"][0].eq(1).all() and copy["b"][0]["c"].eq(0).all()


def test_background_and_foreground_write_the_same_bytes(saver, tmp_path):
    written = []
    for background in (True, False):
        one = saver(background)
        one.best(state(5, metrics={"loss": 1.0}))
        for step in (1, 2, 3):
            one.checkpoint(state(step, optimizer={"lr": 0.1}))
        one.finish()
        assert one.store.steps() == [2, 3]
        written.append([p.read_bytes() for p in (tmp_path / "best.pt", one.store.path(2), one.store.path(3))])
        for step in (2, 3):
            one.store.path(step).unlink()
    assert written[0] == written[1]


def test_training_goes_on_while_one_is_written_and_the_second_waits(saver):
    go, wrote = threading.Event(), []

    def slow():
        go.wait(60)
        wrote.append(1)

    one = saver(sync_log=slow)
    one.checkpoint(state(1))
    assert wrote == [] and one.store.steps() == []  # the call came back, nothing is written yet
    second = threading.Thread(target=one.checkpoint, args=(state(2),))
    second.start()
    second.join(timeout=0.5)
    assert second.is_alive()  # neither skipped nor overtaking
    go.set()
    second.join(timeout=60)
    one.finish()
    assert one.store.steps() == [1, 2]


def test_older_ones_are_deleted_only_once_the_new_one_is_committed(saver, fault):
    one = saver()
    for step in (1, 2):
        one.checkpoint(state(step))
    fault("disk_full@checkpoint.fsynced:step=3")
    one.checkpoint(state(3))
    with pytest.raises(UserError):
        one.finish()
    assert one.store.steps() == [1, 2]


@pytest.mark.parametrize("point", ["checkpoint.begin", "checkpoint.write", "checkpoint.fsynced"])
def test_a_full_disk_is_warned_of_and_the_next_save_tries_again(saver, fault, capfd, point):
    one = saver()
    one.checkpoint(state(1))
    fault(f"disk_full@{point}:step=2")
    one.checkpoint(state(2))
    one.checkpoint(state(3))  # waits for the failure, and saves
    one.finish()
    warned = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == 1
    assert "step_00000002.pt: could not be written (No space left on device)" in warned[0]
    assert "a kill falls back to step 1" in warned[0]
    assert one.store.steps() == [1, 3]
    assert not list(one.store.folder.glob(".*"))


def test_the_runs_last_save_must_succeed(saver, fault):
    one = saver()
    one.checkpoint(state(1))
    fault("disk_full@checkpoint.write:step=2")
    one.checkpoint(state(2))
    with pytest.raises(UserError, match=r"No space left on device.*run the same command.*after step 1"):
        one.finish()


def test_no_checkpoint_is_committed_before_the_best_it_speaks_of(saver, fault):
    one = saver()
    fault("disk_full@best.write:step=4")
    one.best(state(4))
    one.checkpoint(state(4))
    with pytest.raises(UserError):
        one.finish()
    assert one.store.steps() == []
    fault("")
    one.checkpoint(state(5))  # pays what is owed
    one.finish()
    assert one.store.steps() == [5] and checkpoints.load(one._best_path)["step"] == 4


def test_no_checkpoint_is_committed_before_the_lines_it_counts(saver):
    def full():
        raise OSError(28, "No space left on device")

    one = saver(sync_log=full)
    one.checkpoint(state(1))
    with pytest.raises(UserError):
        one.finish()
    assert one.store.steps() == []


def test_a_crash_of_the_thread_is_raised_by_the_next_save(saver, fault):
    one = saver()
    fault("raise@checkpoint.written:step=1")
    one.checkpoint(state(1))
    with pytest.raises(RuntimeError, match=r"fault at checkpoint\.written"):
        one.checkpoint(state(2))
    assert one.store.steps() == [] and not list(one.store.folder.glob(".*"))


def test_an_exit_while_one_is_written_waits_for_it(tmp_path, repo_root):
    program = f"""
import sys, time; sys.path.insert(0, {str(repo_root)!r})
from pathlib import Path
from engines.checkpoint.files import CheckpointFolder
from engines.checkpoint.async_saver import Saver
folder = Path({str(tmp_path)!r})
saver = Saver(CheckpointFolder(folder / "checkpoints", 2), folder / "best.pt", lambda: time.sleep(1), background=True)
saver.checkpoint({{"step": 1}})
print("leaving", flush=True)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and done.stdout == "leaving\n", done.stderr
    assert (tmp_path / "checkpoints" / "step_00000001.pt").is_file()
