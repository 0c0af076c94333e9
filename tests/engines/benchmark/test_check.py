"""The GPU check: its parts, its file, its time limits; on a CPU all of it runs, and none of it is judged."""

import json
import os
import subprocess
import sys
import time

import pytest

from dataio.core.errors import UserError
from engines.benchmark import check_run
from engines.benchmark.check_child import measure_of
from engines.benchmark.check_parts import DATA, DEADLINE, PARTS, CheckPart, chosen_parts
from engines.benchmark.check_run import CheckPlan, run_check
from engines.benchmark.goals import GOALS
from tests.support import alive, environment


@pytest.fixture
def plan(tmp_path):
    def make(parts, **changes):
        values = {
            "device": "cpu",
            "data": str(tmp_path / "data"),
            "output": str(tmp_path / "out" / "gpu.json"),
        }
        return CheckPlan(parts=parts, **{**values, **changes})

    return make


def read(plan):
    with open(plan.output) as file:
        return json.load(file)


def test_all_parts_fit_eight_minutes_and_are_stopped_before_ten():
    usual = chosen_parts("")
    assert DATA.expected + sum(part.expected for part in usual) <= 480
    assert DEADLINE < 600
    assert {part.name for part in usual} == PARTS.keys() - {"compile"}
    for part in (DATA, *PARTS.values()):
        assert part.expected < part.limit
        assert callable(measure_of(part.name))


def test_parts_are_chosen_by_name_in_their_order():
    assert [part.name for part in chosen_parts("compile, tars,step")] == ["step", "tars", "compile"]
    with pytest.raises(UserError, match="--parts speed: no such part; expected some of tests,step"):
        chosen_parts("tars,speed")


def test_the_goals_are_those_of_the_project_and_name_parts():
    assert all(goal.figure[0] in PARTS for goal in GOALS)
    table = [(goal.floor, goal.goal_text()) for goal in GOALS[:8]]
    assert table == [
        (7000, "9,000 img/s"),
        (6500, "> 7,950 img/s"),
        (95, "99 % of the row above"),
        (5, "< 1 %"),
        (25_000, "29,000 img/s with at most 3 cores"),
        (8, "3 s"),
        (None, ""),
        (200, "20 ms"),
    ]


def test_a_part_that_fails_leaves_the_others_and_results_merge(plan):
    said: list[str] = []
    assert run_check(plan("cifake"), said.append) == 1
    first = read(plan("cifake"))
    assert first["parts"]["cifake"]["status"] == "failed"
    assert "no shards of CIFAKE were given" in first["parts"]["cifake"]["errors"]["cifake"]
    assert any("add --cifake FOLDER" in line for line in said)
    assert run_check(plan("tests"), said.append) == 0
    both = read(plan("tests"))
    assert both["parts"]["cifake"] == first["parts"]["cifake"]
    tests = both["parts"]["tests"]
    assert tests["status"] == "done" and tests["figures"]["skipped"]["value"] > 20
    assert tests["commit"] == both["commit"] and tests["seconds"] > 0
    assert {row["met"] for row in both["goals"]} == {"not measured"}
    # A part that there was no time for keeps what an earlier check measured.
    assert run_check(plan("tests,step"), said.append, deadline=0) == 1
    late = read(plan("tests"))["parts"]
    assert late["tests"] == tests and late["step"]["status"] == "not run"
    assert run_check(plan("cifake"), said.append) == 1
    assert read(plan("cifake"))["parts"]["tests"] == tests


def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(plan, monkeypatch):
    slow = CheckPart("tests", "tests/gpu", 1, 4.0)
    started: list[int] = []
    popen = subprocess.Popen

    def noted(*words, **options):
        process = popen(*words, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(check_run.subprocess, "Popen", noted)
    begin = time.monotonic()
    record = check_run._run_part(slow, check_run._task(plan("tests")), slow.limit, lambda text: None)
    assert record["status"] == "timed out" and time.monotonic() - begin < 30
    assert record["errors"] == {"tests": "stopped after 4 s"}
    group = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if alive(pid)]
    assert not [pid for pid in group if _group(pid) in started]


def _group(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "telltale-benchmark"}, "is not the file of a GPU check"),
        ({"machine": {"gpu": "NVIDIA H100", "processor": ""}}, "its gpu is 'NVIDIA H100', here it is"),
        ({"settings": {"tiny": True, "device": "cpu"}}, "its tiny is True, here it is False"),
    ],
)
def test_files_of_something_else_are_kept(plan, change, said):
    asked = plan("tests")
    written = check_run._document(asked, check_run._task(asked))
    with open(asked.output, "w") as file:
        json.dump({**written, **change}, file)
    with pytest.raises(UserError, match=said):
        run_check(asked, lambda text: None)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*gpu\.json: cannot be written"):
        run_check(plan("tests", output=str(tmp_path / "file" / "gpu.json")), lambda text: None)


def command(repo_root, *words):
    line = [sys.executable, str(repo_root / "launch/benchmark.py"), "gpu-check", *words]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1500)


def test_its_sizes_are_its_own(repo_root):
    for words in (["--batch", "32"], ["--compare", "a.json"]):
        done = command(repo_root, *words)
        assert done.returncode == 2 and f"{words[0]} is {words[1]}: gpu-check has its own" in done.stderr


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param("step,decode", marks=pytest.mark.slow),
        pytest.param(",".join(name for name in PARTS if name != "compile"), marks=pytest.mark.long),
    ],
    ids=["two parts", "all parts"],
)
def test_parts_run_for_real_on_a_cpu(repo_root, tmp_path, names):
    output = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--parts", names, "--data", str(tmp_path), "--output", str(output)]
    done = command(repo_root, *words)
    found = json.loads(output.read_text())
    assert {name: part["errors"] for name, part in found["parts"].items() if part["errors"]} == {}
    assert done.returncode == 0, done.stdout + done.stderr
    met = {row["met"] for row in found["goals"]}
    assert met == ({"not judged"} if "cifake" in names else {"not judged", "not measured"})
    for name, part in found["parts"].items():
        assert part["status"] == "done"
        for figure, values in part["figures"].items():
            assert f"{name}: {figure}: " in done.stdout and values["value"] >= 0
