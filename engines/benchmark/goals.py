"""The project's goals on one GPU, measured in one run: goal, floor, measured value, whether it is met."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from engines.benchmark.case import BenchmarkSettings, Result
from engines.benchmark.harness import run_group
from engines.benchmark.registry import GROUPS
from engines.runtime.paths import CONFIGS, ROOT
from engines.stats.text_table import text_table

CIFAKE_CONFIG = CONFIGS / "cifake_speedrun.yaml"
CIFAKE_ERROR = 0.0306
_UPSTREAM = "Hugging Face Trainer, upstream's recipe"
# The cases that the goals need, by group.
CASES = {
    "load": ("telltale",),
    "train": ("telltale",),
    "checkpoint": ("telltale (in the background)",),
    "finetune": ("telltale", _UPSTREAM),
}
Results = Mapping[tuple[str, str], Result]


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        floor, goal: in `unit`; the required and the desired value.
        lower: whether less is better. measured: computes the value from results by (group, case).
    """

    name: str
    unit: str
    floor: float
    goal: float
    lower: bool
    measured: Callable[[Results], float]


def _tokens(results: Results) -> float:
    telltale, upstream = results["finetune", "telltale"], results["finetune", _UPSTREAM]
    return telltale.extra["tokens_per_second"] / upstream.extra["tokens_per_second"]


GOALS = (
    Goal(
        "ResNet-50, 224 px, end to end from tars",
        "img/s",
        5000,
        7950,
        False,
        lambda results: results["train", "telltale"].median,
    ),
    Goal(
        "decoding and augmenting JPEG of 256 px",
        "img/s",
        10_000,
        16_000,
        False,
        lambda results: results["load", "telltale"].median,
    ),
    Goal(
        "share of training that waits for data",
        "%",
        5,
        1,
        True,
        lambda results: 100 * results["train", "telltale"].extra["data_wait_share"],
    ),
    Goal(
        "stall of a checkpoint",
        "ms",
        1000,
        50,
        True,
        lambda results: results["checkpoint", CASES["checkpoint"][0]].extra["stall_ms"],
    ),
    Goal("finetuning, tokens/s beside upstream's recipe", "times", 1.2, 2.0, False, _tokens),
)


def compare_with_goals(results: Sequence[Result], *, gpu: bool) -> list[dict[str, Any]]:
    """A row for each goal: name, unit, floor, goal, measured (None where it was not), met.

    met is "goal", "floor", "no", "not measured" or, for values from a CPU, "not a GPU".
    """
    by_case = {(result.group, result.case): result for result in results}
    rows = []
    for goal in GOALS:
        try:
            measured = goal.measured(by_case)
        except KeyError:
            measured = None
        rows.append(_row(goal.name, goal.unit, goal.floor, goal.goal, goal.lower, measured, gpu))
    return rows


def _row(
    name: str, unit: str, floor: float, goal: float, lower: bool, measured: float | None, gpu: bool
) -> dict[str, Any]:
    sign = -1 if lower else 1
    if measured is None:
        met = "not measured"
    elif not gpu:
        met = "not a GPU"
    elif sign * measured >= sign * goal:
        met = "goal"
    else:
        met = "floor" if sign * measured >= sign * floor else "no"
    row = {"name": name, "unit": unit, "floor": floor, "goal": goal, "measured": measured, "met": met}
    return {key: None if value == math.inf else value for key, value in row.items()}


def measure_goals(settings: BenchmarkSettings, repeats: int, say: Callable[[str], None]) -> list[Result]:
    """Run the cases that the goals need; a group that fails is reported and left out."""
    results: list[Result] = []
    for name, cases in CASES.items():
        group = GROUPS[name]
        group = replace(group, cases={case: group.cases[case] for case in cases})
        try:
            results += run_group(group, settings, repeats, say)
        except RuntimeError as error:
            say(f"{name}: {error}")
    return results


def run_gpu_tests(say: Callable[[str], None], timeout: float = 400) -> dict[str, Any]:
    """tests/gpu by pytest: a row as of a goal; `measured` is its exit code."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        last, code = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1], done.returncode
    except subprocess.TimeoutExpired:
        last, code = f"not done after {timeout:g} s", 1
    say(f"tests/gpu: {last}")
    all_skipped = code == 0 and " passed" not in last
    met = "not a GPU" if all_skipped else ("goal" if code == 0 else "no")
    return {
        "name": f"tests/gpu ({last})",
        "unit": "exit code",
        "floor": 0,
        "goal": 0,
        "measured": code,
        "met": met,
    }


def time_to_error(lines: Sequence[Mapping[str, Any]], error: float) -> float | None:
    """Seconds of training, validation too, until real/fake error is below `error`; None: never.

    Args:
        lines: of metrics.jsonl.
    """
    seconds = 0.0
    for line in lines:
        seconds += line.get("perf", {}).get("seconds", 0.0)
        measured = line.get("real_fake_error")
        if line["kind"] == "val" and measured is not None and measured < error:
            return seconds
    return None


def run_cifake(
    shards: str, folder: Path, device: str, say: Callable[[str], None], timeout: float = 300
) -> dict[str, Any]:
    """Train CIFAKE by its speed run's configuration: a row; `measured` seconds until the error is reached.

    Raises:
        UserError: no shards there.
    """
    if not (Path(shards) / "manifest.json").is_file():
        raise UserError(
            f"--cifake {shards}: no manifest.json there; give a folder that launch/shard.py wrote"
        )
    run = folder / f"cifake-{time.time_ns()}"
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(CIFAKE_CONFIG)]
    command += ["--data.shards", shards, "--run.dir", str(run), "--log.wandb", "off"]
    environment = {**os.environ, **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            say(f"CIFAKE: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    except subprocess.TimeoutExpired:
        say(f"CIFAKE: not done after {timeout:g} s")
    log = run / "metrics.jsonl"
    text = log.read_text().splitlines() if log.is_file() else []
    seconds = time_to_error([json.loads(line) for line in text], CIFAKE_ERROR)
    name = f"CIFAKE, real/fake error below {CIFAKE_ERROR:.2%}"
    return _row(name, "s", math.inf, math.inf, True, seconds, device == "cuda")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def goals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The goals as Markdown."""
    cells = [
        [
            row["name"],
            *(
                "" if row[key] is None else f"{_short(row[key])} {row['unit']}"
                for key in ("floor", "goal", "measured")
            ),
            row["met"],
        ]
        for row in rows
    ]
    return text_table(cells, ["goal", "floor", "target", "measured", "met"], markdown=True)
