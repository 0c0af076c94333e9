"""The check of several GPUs: what it asks for, what it makes of losses; on a CPU all of it runs on two processes."""

import io
import json
import subprocess
import sys

import pytest

from dataio.core.errors import UserError
from engines.benchmark.check_child import measure_of
from engines.benchmark.check_launchers import first_devices
from engines.benchmark.check_multi import RUN_TOLERANCE, compare_runs, fewer_counts, scaling_counts
from engines.benchmark.check_parts import DATA, MULTI_PARTS, chosen_parts
from engines.benchmark.check_ranks import run_program
from engines.benchmark.check_report import Reporter
from engines.benchmark.check_run import CheckPlan, run_check
from engines.benchmark.session import gpus_to_check
from tests.support import environment


def test_all_parts_fit_eight_minutes():
    assert DATA.expected + sum(part.expected for part in MULTI_PARTS.values()) <= 480
    assert chosen_parts("", MULTI_PARTS) == list(MULTI_PARTS.values())
    for part in MULTI_PARTS.values():
        assert part.expected < part.limit
        assert callable(measure_of(part.name))
    with pytest.raises(UserError, match="--parts step: no such part; expected some of nccl,ddp"):
        chosen_parts("step", MULTI_PARTS)


def test_numbers_of_gpus():
    assert [scaling_counts(gpus) for gpus in (2, 3, 4, 6, 8)] == [
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]
    assert [fewer_counts(gpus) for gpus in (2, 3, 8)] == [[1], [2, 1], [7, 1]]


@pytest.mark.parametrize(
    ("seen", "requested", "said"),
    [
        (1, 0, "PyTorch sees 1 GPU here, a multi-GPU check needs 2 at least; use gpu-check"),
        (4, 5, "--gpus is 5, but PyTorch sees 4 here; give at most that"),
        (4, 1, "--gpus is 1, expected 2 to 8"),
        (16, 9, "--gpus is 9, expected 2 to 8"),
    ],
)
def test_gpus_that_are_not_there(monkeypatch, seen, requested, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    with pytest.raises(UserError, match=said):
        gpus_to_check(requested, "cuda")


def test_all_gpus_are_taken_up_to_eight(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for seen, taken in ((2, 2), (8, 8), (16, 8)):
        monkeypatch.setattr("torch.cuda.device_count", lambda seen=seen: seen)
        assert gpus_to_check(0, "cuda") == taken
    assert gpus_to_check(0, "cpu") == 2


def compared(found, expected):
    stream = io.StringIO()
    compare_runs(Reporter(stream), "losses", found, expected)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_losses_that_differ_by_more_than_rounding_fail():
    (same,) = compared([2.0, 1.0], [2.0, 1.0 + RUN_TOLERANCE / 2])
    assert same["figure"] == "losses" and same["value"] == pytest.approx(RUN_TOLERANCE / 2, rel=0.01)
    for found in ([2.0, 1.01], [2.0, float("nan")], [float("nan"), 1.0], [2.0]):
        assert compared(found, [2.0, 1.0])[-1]["failed"] == "losses"


def test_deepspeed_gets_the_gpus_that_are_visible():
    assert [first_devices(visible, 2) for visible in ("", "4,5,6", "7, 3")] == ["0,1", "4,5", "7,3"]
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES is GPU-8f2a, expected numbers"):
        first_devices("GPU-8f2a", 1)


def test_a_program_that_fails_names_its_error():
    told = "raise ValueError('too few')"
    with pytest.raises(RuntimeError, match="ended with code 1: ValueError: too few"):
        run_program([sys.executable, "-c", told])


def test_files_of_the_two_checks_and_of_other_numbers_of_gpus_do_not_merge(tmp_path):
    output = tmp_path / "multi.json"

    def check(gpus, parts="nccl"):
        plan = CheckPlan(parts, "cpu", str(tmp_path), tiny=True, output=str(output), gpus=gpus)
        # Without time for its part a check still writes its file.
        return run_check(plan, lambda text: None, deadline=0)

    assert check(2) == 1
    assert json.loads(output.read_text())["schema"] == "telltale-multigpu-check"
    with pytest.raises(UserError, match="its gpus is 2, here it is 3"):
        check(3)
    with pytest.raises(UserError, match="is not the file of a GPU check"):
        check(0, "tests")


def command(repo_root, *words):
    line = [sys.executable, str(repo_root / "launch/benchmark.py"), *words]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["multigpu-check", "--gpus", "1"], "error: --gpus is 1, expected 2 to 8"),
        (["multigpu-check", "--cifake", "a"], "error: --cifake is a, expected only with gpu-check"),
        (["gpu-check", "--gpus", "2"], "error: --gpus is 2, expected only with multigpu-check"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(repo_root, words, said):
    done = command(repo_root, *words)
    assert (done.returncode, done.stderr.splitlines()) == (2, [said])


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param(",".join(MULTI_PARTS), marks=pytest.mark.long),
    ],
    ids=["one part", "all parts"],
)
def test_parts_run_for_real_on_two_processes(repo_root, tmp_path, names):
    output = tmp_path / "multi.json"
    words = ["--device", "cpu", "--tiny", "--gpus", "2", "--parts", names]
    done = command(repo_root, "multigpu-check", *words, "--data", str(tmp_path), "--output", str(output))
    found = json.loads(output.read_text())
    assert {name: part["errors"] for name, part in found["parts"].items() if part["errors"]} == {}
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["parts"].keys() == {"data", *names.split(",")}
    figures = {
        (part, name): f for part, record in found["parts"].items() for name, f in record["figures"].items()
    }
    assert figures["ddp", "losses, 2 processes beside 1"]["value"] <= RUN_TOLERANCE
    assert figures["ddp", "spread of weights over 2 processes"]["value"] == 0
    assert figures["ddp", "first gradient's norm, 2 processes beside 1"]["value"] <= RUN_TOLERANCE
    if names != "ddp":
        compared = {part for part, name in figures if "tolerance" in figures[part, name]}
        assert compared == {"ddp", "graphs", "launchers", "resume"}
        rates = [
            figures["scaling", f"{kind}, 2 processes"]["value"] for kind in ("step alone", "from shards")
        ]
        assert min(rates) > 0
        assert figures["nccl", "all-reduce, 4,096 bytes"]["value"] > 0
