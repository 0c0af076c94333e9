"""A grid of training runs on this machine, from a sweep file in Weights & Biases' format.

The same file works with `wandb sweep`, which needs an account. Here every combination is trained
by telltale train, one after the other, and evaluated; one table lists all. A killed grid resumes:
finished runs are skipped.
"""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, one_line
from dataio.core.log import log
from dataio.core.parent_process import die_with_parent
from engines.checkpoint.files import CheckpointFolder
from engines.runtime.command import Stopped
from engines.runtime.paths import ROOT, find_config
from engines.stats.text_table import text_table

_ERRORS = ("generator_error", "real_fake_error", "object_error", "joint_error")


@dataclass(frozen=True)
class Combination:
    """One run of a grid: its name (also its folder's) and its flags in order."""

    name: str
    settings: dict[str, Any]

    def flags(self) -> list[str]:
        return [f"--{key}={_flag(value)}" for key, value in self.settings.items()]


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_grid(path: str | Path) -> list[Combination]:
    """All combinations of a sweep file, in the order of its parameters.

    Args:
        path: YAML with `method: grid` and `parameters: {key: {values: [...]}}` or `{value: x}`;
            keys are train.py's flags without dashes.

    Raises:
        UserError: unreadable, another method, no parameters, or a parameter of another form.
    """
    path = find_config(path)
    try:
        sweep = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({one_line(error)[:200]})") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise UserError(
            f"{path}: no parameters, expected a sweep file such as configs/sweeps/quickstart.yaml"
        )
    if sweep.get("method") != "grid":
        raise UserError(
            f"{path}: method is {sweep.get('method')!r}, only grid runs without an account; "
            f"use `wandb sweep {path}` or method: grid"
        )
    choices: dict[str, list[Any]] = {}
    for key, entry in sweep["parameters"].items():
        if not isinstance(entry, dict) or not ("value" in entry or isinstance(entry.get("values"), list)):
            raise UserError(f"{path}: parameters.{key} is {entry!r}, expected value: x or values: [x, y]")
        choices[key] = [entry["value"]] if "value" in entry else entry["values"]
    varied = [key for key, values in choices.items() if len(values) > 1]
    combinations = [
        Combination(
            "_".join(_short(key, settings[key]) for key in varied) or "run",
            settings,
        )
        for values in itertools.product(*choices.values())
        for settings in [dict(zip(choices, values, strict=True))]
    ]
    names = [combination.name for combination in combinations]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two combinations are called {_twice(names)}; remove the repeated value")
    return combinations


def _short(key: str, value: Any) -> str:
    if key == "config":
        return Path(str(value)).stem
    return f"{key.rpartition('.')[2]}{_flag(value)}".replace("/", "-")


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def run_grid(
    combinations: Sequence[Combination],
    output: Path,
    flags: Sequence[str],
    *,
    processes: int,
    split: str,
    weights: str,
) -> list[dict[str, Any]]:
    """Train and evaluate every combination; the row of a failed one has the reason.

    Args:
        output: holds one run folder for each, and grid.csv.
        flags: for train.py, in all runs; they override the combination's.
        processes: of each torchrun. split: evaluated. weights: "best" or "last".

    Returns:
        a row for each combination: name, steps, best_step, validation and test errors as
        fractions, failure ("" if none).
    """
    rows = []
    for number, combination in enumerate(combinations, start=1):
        log.info(f"[{number}/{len(combinations)}] {combination.name}")
        folder = output / combination.name
        row = run_combination(combination, folder, flags, processes, split, weights, group=output.name)
        if row["failure"]:
            log.info(f"  failed: {row['failure']}")
        rows.append(row)
        _write_table(output / "grid.csv", rows)
    return rows


def run_combination(
    combination: Combination,
    folder: Path,
    flags: Sequence[str],
    processes: int,
    split: str,
    weights: str,
    *,
    group: str,
) -> dict[str, Any]:
    """Train one combination into `folder` (its log lies beside) and evaluate it into `folder`/evaluation.

    Args:
        group: of Weights & Biases, where neither log.group nor WANDB_RUN_GROUP names one.

    Returns:
        its row of the table, see `run_grid`.
    """
    row: dict[str, Any] = {"name": combination.name, "failure": ""}
    settings = dict(combination.settings)
    if "config" in settings:
        settings["config"] = str(find_config(settings["config"]))
    own_flags = Combination(combination.name, settings).flags()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    train = [str(ROOT / "launch" / "train.py"), *own_flags, *flags, f"--run.dir={folder}"]
    log = _log_of(folder)
    names = {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or group, "WANDB_NAME": combination.name}
    if _call([*launcher, *train], log, "w", names) != 0:
        return {**row, "failure": _failure(folder)}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    store = CheckpointFolder(folder / "checkpoints", 1)
    file = folder / "best.pt" if weights == "best" else store.path(store.steps()[-1])
    evaluate = [str(ROOT / "launch" / "evaluate.py"), "--checkpoint", str(file), "--split", split]
    evaluate += ["--data", config["data"]["shards"], "--output", str(folder / "evaluation")]
    evaluate += ["--wandb", config["log"]["wandb"]]
    if _call(evaluate, log, "a", names) != 0:
        return {**row, "failure": f"evaluation failed, see {log}"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "val"]
    row["steps"] = max(line["step"] for line in lines)
    if validations:
        row.update({f"val_{key}": validations[-1][key] for key in _ERRORS})
        known = [line for line in validations if line["joint_error"] is not None]
        best = min(known or validations, key=lambda line: line["joint_error" if known else "loss"])
        row["best_step"] = best["step"]
        row.update({f"best_val_{key}": best[key] for key in _ERRORS})
    overall = json.loads((folder / "evaluation" / "metrics.json").read_text())["overall"]
    return {**row, **{f"{split}_{key}": overall[key] for key in _ERRORS}}


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")  # not with_suffix: names have rates such as 0.01


def _call(words: list[str], log: Path, mode: str, variables: Mapping[str, str] | None = None) -> int:
    """Run a launch command, with more environment variables; returns its exit code.

    Raises:
        Stopped: this process was asked to stop; the command has saved and ended.
    """
    received: list[int] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, mode) as file:
        child = subprocess.Popen(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(variables or {})},
            # A training that outlived a killed grid would block the next; on SIGTERM torchrun's workers save.
            preexec_fn=partial(die_with_parent, signal.SIGTERM, os.getpid()),
        )

        def forward(number: int, frame: FrameType | None) -> None:
            received.append(number)
            child.send_signal(signal.SIGTERM)  # torchrun forwards it to its workers

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise Stopped(signal.Signals(received[0]).name)
    return code


def _failure(folder: Path) -> str:
    """The error message of a failed run, from its exit.json or else its log."""
    log = _log_of(folder)
    try:
        return json.loads((folder / "exit.json").read_text())["message"]
    except (OSError, ValueError, KeyError):
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else f"see {log}"


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def format_grid(rows: Sequence[dict[str, Any]], split: str) -> str:
    """A table with a line for each run: errors in percent; failed runs below it."""
    groups = {"val_": "last validation", "best_val_": "best validation", f"{split}_": split}
    cells = [
        [row["name"], row["steps"], *(_cell(row, prefix) for prefix in groups)]
        for row in rows
        if not row["failure"]
    ]
    lines = ["errors in %: real/fake, generator, object, joint", ""]
    lines.append(text_table(cells, ["run", "steps", *groups.values()], align="lrrrr"))
    lines += [f"{row['name']} failed: {row['failure']}" for row in rows if row["failure"]]
    return "\n".join(lines)


def _cell(row: dict[str, Any], prefix: str) -> str:
    order = ("real_fake_error", "generator_error", "object_error", "joint_error")
    values = [row.get(prefix + key) for key in order]
    return " ".join(f"{'-':>6}" if value is None else f"{100 * value:6.2f}" for value in values)
