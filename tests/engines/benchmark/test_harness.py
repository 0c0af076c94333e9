"""The benchmark: what it computes from runs, and that its commands work. Never how fast anything is."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest

from dataio.core.errors import UserError
from engines.benchmark import harness
from engines.benchmark.case import BenchmarkSettings, Group, Result, Run, Unavailable, timed
from engines.benchmark.document import document, machine, ratios, read_document, regressions, results_table
from engines.benchmark.harness import run_group
from engines.benchmark.registry import GROUPS
from launch.benchmark import APART, NAMES
from tests.support import environment


def result(case, rates, group="load"):
    return Result(
        group, case, "images", rates[0] / 2, list(rates), 1.5, 0.002, 300.0, {"data_wait_share": 0.01}
    )


SETTINGS = BenchmarkSettings(folder="nowhere")
RESULTS = [result("telltale", (300, 100, 200)), result("other", (40, 50, 60))]


def written(results=RESULTS):
    groups = [Group("load", "", "images", {})]
    return json.loads(json.dumps(document(results, groups, SETTINGS, machine())))


def test_ratios_are_of_medians_and_the_table_shows_them():
    assert ratios(RESULTS, [Group("load", "", "images", {})]) == {"load: telltale / other": 4.0}
    text = re.sub(" +", " ", results_table(written()))
    assert "| load | telltale | 200 (100 to 300) images | 150 | 2 | 300 | data wait share 0.01 |" in text
    assert "| load: telltale / other | 4.00 |" in text


def test_a_document_is_read_again_and_names_no_path(tmp_path):
    path = tmp_path / "b.json"
    path.write_text(json.dumps(written()))
    assert read_document(path)["results"][0]["median"] == 200
    assert "nowhere" not in path.read_text()
    for content in ("{", "[]", '{"schema": "x"}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"b\.json"):
            read_document(path)


def test_only_what_fell_by_more_than_the_tolerance_is_a_regression():
    new = written([result("telltale", (169, 169, 169)), result("other", (43, 43, 43)), result("new", (1, 1))])
    assert regressions(written(), new, 0.15) == ["load telltale: 169 images/s, 16% below 200"]
    assert regressions(written(), new, 0.2) == []


def test_work_is_repeated_until_its_time_is_over():
    assert timed(lambda: 3, 0.0)[0] == 3
    images, seconds = timed(lambda: 3, 0.02)
    assert images > 3 and images % 3 == 0 and seconds >= 0.02


def test_the_command_knows_all_groups_and_ours_comes_first():
    assert tuple(GROUPS) == (*NAMES, *APART)
    for name, group in GROUPS.items():
        assert group.name == name
        assert next(iter(group.cases)).startswith("telltale") and len(group.cases) > 1


@contextmanager
def counts(settings):
    yield lambda: Run(2, 0.5)


@contextmanager
def lacks(settings):
    if settings.seconds:
        raise Unavailable("a GPU that is not here")
    yield


GROUPS_HERE = {"tried": Group("tried", "", "things", {"telltale": counts, "other": lacks, "third": counts})}


def test_a_case_that_cannot_run_is_said_and_left_out(monkeypatch):
    # Cases are looked up by name in a process of their own: this module's, in place of all groups.
    monkeypatch.setattr("engines.benchmark.harness._serve", serve_here)
    said: list[str] = []
    results = run_group(GROUPS_HERE["tried"], SETTINGS, 1, said.append)
    assert [(result.case, result.median) for result in results] == [("telltale", 4.0), ("third", 4.0)]
    assert "tried: without other: a GPU that is not here" in said


def serve_here(connection, group, case, settings):
    harness.GROUPS = GROUPS_HERE  # type: ignore[assignment]
    harness._serve(connection, group, case, settings)


def command(repo_root, tmp_path, *words):
    line = [sys.executable, str(repo_root / "launch/benchmark.py"), *words, "--data", str(tmp_path / "data")]
    return subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1100)


@pytest.mark.slow
def test_a_tiny_run_measures_every_case_and_is_compared(repo_root, tmp_path):
    done = command(repo_root, tmp_path, "read", "--tiny", "--output", "out/b.json")
    assert done.returncode == 0, done.stderr
    found = read_document(tmp_path / "out" / "b.json")
    cases = [(each["group"], each["case"]) for each in found["results"]]
    assert cases == [(name, case) for name in ("read",) for case in GROUPS[name].cases]
    for each in found["results"]:
        assert each["median"] > 0 and each["cpu_seconds_per_image"] >= 0 and each["peak_mib"] > 1
    for each in found["results"]:
        each["median"] *= 1e6
    (tmp_path / "fast.json").write_text(json.dumps(found))
    again = command(repo_root, tmp_path, "read", "--tiny", "--compare", str(tmp_path / "fast.json"))
    assert again.returncode == 1 and "100% below" in again.stdout


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_group_runs(repo_root, tmp_path):
    rest = [name for name in NAMES if name != "read"]
    done = command(repo_root, tmp_path, *rest, "--tiny", "--output", "b.json")
    assert done.returncode == 0, done.stderr
    found = read_document(tmp_path / "b.json")["results"]
    assert [each["group"] for each in found] == [name for name in rest for _ in GROUPS[name].cases]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fast"], "fast: no such group"),
        (["read", "--repeats", "0"], "--repeats is 0"),
        (["read", "--compare", "none.json"], "none.json: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(repo_root, tmp_path, words, said):
    done = command(repo_root, tmp_path, *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "data").exists()
