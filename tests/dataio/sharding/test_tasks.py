"""Several tasks on one folder: the bytes of one process, whoever is killed."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataio.core.errors import UserError
from dataio.core.locks import locked
from dataio.core.tasks import ArrayTask
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.job import WORK
from tests.support import alive, descendants, environment, wait_until


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "images"
    write_synthetic(folder, images=400, size=48, seed=4)
    next(folder.glob("*/*/train/ai/*")).write_bytes(b"")
    return folder


def words(source, output, repo_root, *more):
    flags = {"--layout": "genimage", "--source": source, "--output": output, "--samples-per-shard": 20}
    pairs = [str(word) for pair in flags.items() for word in pair]
    script = str(repo_root / "launch" / "shard.py")
    return [sys.executable, script, *pairs, "--codec.size", "48", *more]


@pytest.fixture(scope="module")
def run(source, repo_root):
    def call(output, *more):
        return subprocess.run(words(source, output, repo_root, *more), capture_output=True, text=True)

    return call


@pytest.fixture(scope="module")
def start(source, repo_root):
    def call(output, *more):
        return subprocess.Popen(
            words(source, output, repo_root, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder that one process writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = run(output, "--workers", "1")
    assert done.returncode == 0, done.stderr
    return output


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def committed(folder: Path) -> int:
    return len(list(folder.glob(".work/*-??????.json")))


def test_two_tasks_one_killed_and_run_again_write_the_bytes_of_one_process(whole, run, start, tmp_path):
    output = tmp_path / "out"
    first, second = (start(output, "--workers", "1", "--task", f"{n}/2") for n in (0, 1))
    # Killed in the middle: while the other goes on, and with a shard half written.
    wait_until(lambda: committed(output) >= 3 and any(output.glob("*/.*.0-of-2.tmp")), 120, "three shards")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(120) == 0, second.stdout
    assert "are missing" in second.stdout.read()

    early = run(output, "--finish")
    assert early.returncode == 2 and "of task 0/2 (" in early.stderr and "1/2" not in early.stderr
    assert not (output / "manifest.json").exists()

    again = run(output, "--workers", "2", "--task", "0/2")
    assert again.returncode == 0 and "all are there: now --finish" in again.stdout
    finished = run(output, "--finish")
    assert finished.returncode == 0, finished.stderr
    assert contents(output) == contents(whole) and not (output / ".work").exists()

    for more in ((), ("--finish",), ("--task", "1/2")):
        assert run(output, *more).returncode == 0
    assert contents(output) == contents(whole)


@pytest.mark.slow
def test_a_plain_run_takes_over_what_tasks_began(whole, run, tmp_path):
    assert run(tmp_path / "out", "--task", "2/3").returncode == 0
    assert run(tmp_path / "out").returncode == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_four_tasks_that_start_at_once_make_one_plan(whole, run, start, tmp_path):
    tasks = [start(tmp_path / "out", "--workers", "1", "--task", f"{n}/4") for n in range(4)]
    assert [task.wait(240) for task in tasks] == [0] * 4, [task.stdout.read() for task in tasks]
    assert run(tmp_path / "out", "--finish").returncode == 0
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
def test_several_that_finish_at_once_wait_for_each_other(whole, run, start, tmp_path):
    """The last two tasks of an array may both see that all shards are there."""
    output = tmp_path / "out"
    assert run(output, "--task", "0/1").returncode == 0
    with locked(output / WORK / "lock", shared=True):  # as a task does that is about to end
        merging = [start(output, "--finish") for _ in range(2)]
        for one in merging:
            assert "waiting for it" in one.stdout.readline()
    assert [one.wait(240) for one in merging] == [0] * 2, [one.stdout.read() for one in merging]
    assert contents(output) == contents(whole)


@pytest.mark.slow
def test_tasks_and_plain_runs_keep_out_of_each_others_way(whole, run, start, tmp_path):
    output = tmp_path / "out"
    running = start(output, "--workers", "1", "--task", "0/2")
    wait_until(lambda: committed(output) >= 1, 120, "a shard")
    os.kill(running.pid, signal.SIGSTOP)
    try:
        plain, same, finish = run(output), run(output, "--task", "0/2"), run(output, "--finish")
        other = run(output, "--task", "1/2")
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert plain.returncode == 2 and "another process is writing it" in plain.stderr
    assert same.returncode == 2 and "--task 0/2: another process is running it" in same.stderr
    assert finish.returncode == 2 and "running), 1/2 (" in finish.stderr
    assert other.returncode == 0, other.stderr
    assert running.wait(120) == 0
    # The other way round: a task while a plain run writes.
    shutil.rmtree(output)
    running = start(output, "--workers", "1")
    wait_until(lambda: committed(output) >= 1, 120, "a shard")
    os.kill(running.pid, signal.SIGSTOP)
    task = run(output, "--task", "0/2")
    os.kill(running.pid, signal.SIGCONT)
    assert task.returncode == 2 and "another process is writing it" in task.stderr
    assert running.wait(120) == 0 and contents(output) == contents(whole)


def test_a_killed_tasks_workers_die_with_it(start, tmp_path):
    task = start(tmp_path / "out", "--workers", "2", "--task", "0/2")
    wait_until(lambda: committed(tmp_path / "out") >= 1, 120, "a shard")
    children = descendants(task.pid)
    task.kill()
    task.wait()
    assert children
    wait_until(lambda: not any(map(alive, children)), 10, "the workers' end")


@pytest.mark.parametrize("text", ["3/2", "2/2", "-1/2", "1", "1/", "a/b", "0/0", ""])
def test_a_bad_task_is_one_line(text):
    with pytest.raises(UserError, match=r"^task .*expected i/n with i from 0 to n-1, as in 0/8"):
        ArrayTask.parse(text)


def test_bad_flags_leave_nothing_behind(run, tmp_path):
    for more, text in (
        (("--task", "3/2"), "--task 3/2: expected i/n"),
        (("--task", "0/2", "--finish"), "give one"),
        (("--finish",), "no plan and no shards"),
    ):
        done = run(tmp_path / "out", *more)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") <= 1
        assert not (tmp_path / "out").exists()


def test_tasks_of_a_source_that_does_not_fit_all_say_so(tmp_path, repo_root):
    (tmp_path / "empty").mkdir()
    tasks = [
        subprocess.Popen(
            words(tmp_path / "empty", tmp_path / "out", repo_root, "--task", f"{n}/2"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in (0, 1)
    ]
    for task in tasks:
        message = task.communicate(timeout=120)[1]
        assert task.returncode == 2 and "no images of the genimage layout" in message
    assert not (tmp_path / "out" / "manifest.json").exists()
