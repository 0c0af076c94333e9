"""Weights & Biases' copy of a run, made again from the run's folder."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dataio.core.errors import UserError, one_line, writing
from engines.runtime.run_folder import FolderLock
from engines.runtime.run_log import read_metrics, record_artifacts
from engines.runtime.wandb_metrics import METRIC_NAMES, BestValues, row_of
from engines.runtime.wandb_mode import choose_mode
from engines.runtime.wandb_run import FACTS, WandbRun, stored_record

SYNC_FOLDER = "wandb-sync"


class Rebuilt(NamedTuple):
    """A run that was made again: its id, rows of metrics, and where it lies if it was made offline."""

    id: str
    rows: int
    offline: Path | None


def rebuild_run(folder: Path, mode: str) -> Rebuilt:
    """Make W&B's copy of a run from config.yaml, metrics.jsonl and images/, under the folder's own id.

    What W&B has of that run is replaced, so a second call changes nothing. Offline, the copy is
    RUN/wandb-sync, which `wandb sync` uploads; it replaces that of an earlier call.

    Args:
        folder: of a training or finetuning run. mode: auto, online or offline, as log.wandb.

    Raises:
        UserError: not a run's folder, a run that is going on, a damaged file, or W&B failed.
    """
    mode = choose_mode(mode)
    if mode not in ("online", "offline"):
        raise UserError(f"WANDB_MODE is {mode}, expected online or offline; give --mode")
    settings, lines = _read(folder)
    with writing(folder, field="run"):
        # Replacing what a live run is logging to would lose rows.
        lock = FolderLock(folder, wait_seconds=0)
    try:
        return _rebuild(folder, mode, settings, lines)
    finally:
        lock.release()


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}, expected the folder of a run")
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        log = settings["log"]
        if not isinstance(log, dict):
            raise ValueError("log is not a section")
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'}: is not a run's ({one_line(error)})") from None
    try:
        lines = read_metrics(folder)
        for line in lines:
            row_of(line, line.get("perf"))
            int(line["step"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: cannot be read ({one_line(error)})") from None
    return settings, lines


def _rebuild(folder: Path, mode: str, settings: dict[str, Any], lines: list[dict[str, Any]]) -> Rebuilt:
    final, partial = folder / SYNC_FOLDER, folder / f".{SYNC_FOLDER}"
    known = {key: value for key, value in stored_record(folder).items() if key in FACTS}
    with writing(folder, field="run"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        run = WandbRun(
            folder,
            mode=mode,
            project=settings["log"].get("project", "telltale"),
            group=settings["log"].get("group", ""),
            job_type="finetuning" if "tune" in settings else "training",
            settings={**settings, **known},
            replaces=True,
            files=partial,
        )
        offline = run.offline_folder
        _log_all(run, folder, settings, lines)
        if not run.running:
            raise UserError(f"{folder}: was not sent; the warning above says why, then run the same again")
        if mode == "online":
            return Rebuilt(run.id, len(lines), None)
        import wandb

        wandb.teardown()  # its process writes the rest when it ends
        with writing(folder, field="run"):
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        assert offline is not None
        return Rebuilt(run.id, len(lines), final / offline.resolve().relative_to(partial.resolve()))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _log_all(run: WandbRun, folder: Path, settings: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    run.define(*METRIC_NAMES)
    for line in lines:
        run.log(row_of(line, line.get("perf")), line["step"])
    best = BestValues(lines).values
    for picture in sorted((folder / "images").glob("*.png")):
        run.picture(picture.stem, picture, lines[-1]["step"] if lines else 0)
    run.summarize(best)
    if settings["log"].get("artifacts"):
        record_artifacts(run, folder, settings, best)
    run.close(_exit_code(folder))


def _exit_code(folder: Path) -> int:
    try:
        return int(json.loads((folder / "exit.json").read_text())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1  # killed
