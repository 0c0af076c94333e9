"""Results of a finished measurement for Weights & Biases: an evaluation, a protocol, a benchmark's answers."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dataio.core.log import log
from engines.runtime.wandb_mode import choose_mode, sends_results
from engines.runtime.wandb_run import WandbRun, code_facts


@dataclass
class ResultTable:
    """A table; a cell may be an `engines.runtime.wandb_run.Picture`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Results:
    """What is sent.

    Attributes:
        job_type: of W&B. settings: what the results depend on.
        values: nested; numbers in it become overall/auroc and so on, the rest is left out.
        tables, pages: by name; pages are HTML files.
    """

    job_type: Literal["evaluation", "protocol", "benchmark"]
    settings: Mapping[str, Any]
    values: Mapping[str, Any]
    tables: Mapping[str, ResultTable] = field(default_factory=dict)
    pages: Mapping[str, Path] = field(default_factory=dict)


def send_results(folder: Path, mode: str, results: Results, *, measured: str | Path = "") -> None:
    """Send results, which lie in `folder`; does nothing where `mode` says so, and never raises.

    The folder has one run (its wandb.json), which another call replaces. Its group is that of the run that
    was measured, so that both are found together.

    Args:
        mode: of `engines.runtime.wandb_mode.WANDB_MODES`.
        measured: checkpoint or model that the results are of, "" for none.
    """
    if not sends_results(mode):
        return
    mode = choose_mode(mode, without_account="off")
    run_folder = run_folder_of(measured) if measured else folder.resolve()
    logged = _log_settings(run_folder)
    # RUN/evaluation is "RUN evaluation"; a folder elsewhere has its own name.
    place = folder.resolve()
    base = os.environ.get("WANDB_NAME") or run_folder.name
    run = WandbRun(
        folder,
        mode=mode,
        project=str(logged.get("project") or "telltale"),
        group=str(logged.get("group") or ""),
        family=run_folder.name,
        name=f"{base} {place.name}" if place != run_folder else base,
        job_type=results.job_type,
        settings={**results.settings, "code": code_facts()},
        replaces=True,
    )
    numbers = _numbers(results.values)
    run.log(numbers)
    for title, table in results.tables.items():
        run.table(title, table.columns, table.rows)
    for title, page in results.pages.items():
        run.page(title, page)
    sent = run.running
    run.close(0)
    if sent and run.running:
        log.info(
            f"Weights & Biases ({mode}): run {run.id}, {len(numbers)} values, {len(results.tables)} tables"
        )


def run_folder_of(measured: str | Path) -> Path:
    """The run's folder of RUN, RUN/best.pt, a file of RUN/checkpoints, or RUN/model."""
    path = Path(measured).resolve()
    if not path.is_dir() or path.name == "model":
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


def _log_settings(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["log"]
        return found if isinstance(found, dict) else {}
    return {}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def table_of(rows: Mapping[str, Mapping[str, Any]], first: str) -> ResultTable:
    """A table with a row for each key, and a column for each value that is a number in one of them.

    Args:
        first: title of the column with the keys.
    """
    columns = list(dict.fromkeys(key for row in rows.values() for key in _numbers(row)))
    return ResultTable(
        [first, *columns],
        [[name, *(_numbers(row).get(column) for column in columns)] for name, row in rows.items()],
    )
