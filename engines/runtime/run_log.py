"""The record of a run: metrics.jsonl, and Weights & Biases and TensorBoard as copies.

Each line of metrics.jsonl has reproducible values at its top level and timings under "perf". A
checkpoint stores the file's length, and resuming truncates to it, so the file of a run that was
killed ten times equals that of an uninterrupted run (except for "perf").
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataio.core.errors import one_line
from dataio.core.log import log
from engines.runtime import fault_injection as faults
from engines.runtime.command import EXIT_RUN_AGAIN, NonFiniteError, Stopped
from engines.runtime.tensorboard_log import TensorBoardLog, check_tensorboard
from engines.runtime.wandb_metrics import METRIC_NAMES, BestValues, row_of
from engines.runtime.wandb_mode import choose_mode
from engines.runtime.wandb_run import WandbRun, code_facts


@dataclass(kw_only=True)
class LogConfig:
    """What is written while the run goes."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is WANDB_MODE's, else online where a key is configured, else offline."""
    project: str = "telltale"
    """Weights & Biases project."""
    group: str = ""
    """Weights & Biases group; by default WANDB_RUN_GROUP's, else the run folder's name."""
    artifacts: bool = False
    """Record weights and shards in Weights & Biases as artifacts: paths and sizes, nothing is uploaded."""
    tensorboard: bool = False
    """Write RUN/tensorboard too; needs telltale[tensorboard]."""
    images: int = 0
    """Pictures per panel (inputs, hardest mistakes, confusion matrix, curves) in RUN/images and W&B; 0: no panels."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}, expected at least 1")
        if self.images < 0:
            raise ValueError(f"log.images is {self.images}, expected 0 or more")


class RunLog:
    """Rank 0's log; other ranks make one with `enabled=False`, which does nothing.

    Args:
        folder: of the run.
        config: the log's settings. settings: the whole configuration, for W&B.
        offset: bytes of metrics.jsonl to keep (from the checkpoint), 0 for a new run.
        wandb_id: of the W&B run in the checkpoint; the folder's own id comes first.
        job_type: of W&B.
        data: digest of the training data, for W&B.

    Raises:
        SharedError: on every rank alike; TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        settings: dict[str, Any],
        *,
        offset: int = 0,
        wandb_id: str = "",
        enabled: bool = True,
        job_type: str = "training",
        data: str = "",
    ) -> None:
        if config.tensorboard:
            check_tensorboard()
        self._enabled = enabled
        self.wandb_id = wandb_id
        if not enabled:
            return
        # Unbuffered, open for the whole run: lines that a full disk refuses stay in `_pending`.
        self._file = open(folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        self._pending, self._writing = b"", threading.Lock()
        # Resuming another run's checkpoint in a new folder must not pad the file with zeros.
        self._file.truncate(min(offset, self._file.seek(0, os.SEEK_END)))
        self._length = self._file.seek(0, os.SEEK_END)
        self._warned = False
        self._folder, self._config, self._settings = folder, config, settings
        # Another run's checkpoint in a new folder begins a run of its own.
        self._start_copies(wandb_id if self._length else "", job_type, data)

    def _start_copies(self, wandb_id: str, job_type: str, data: str) -> None:
        mode = choose_mode(self._config.wandb)
        self._best, self._skipped, last = BestValues(), 0, -1
        if self._config.tensorboard or mode != "off":
            try:
                kept = read_metrics(self._folder)
                self._best = BestValues(kept)
                self._skipped = max((line.get("skipped", 0) for line in kept), default=0)
                last = max((line["step"] for line in kept), default=-1)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                log.warning(f"metrics.jsonl: cannot be read ({one_line(error)}); the copies of it start anew")
        # Every line up to a checkpoint's step is kept, so what follows the last one is written again.
        self._board = TensorBoardLog(self._folder, last + 1) if self._config.tensorboard else None
        self._wandb = WandbRun(
            self._folder,
            mode=mode,
            project=self._config.project,
            group=self._config.group,
            job_type=job_type,
            # The commit takes a process of git, which only a run of W&B is worth.
            settings={} if mode == "off" else self._facts(data),
            checkpoints_id=wandb_id,
        )
        self._wandb.define(*METRIC_NAMES)
        self._wandb.summarize(self._best.values)
        self.wandb_id = self._wandb.id

    def _facts(self, data: str) -> dict[str, Any]:
        return {**self._settings, "code": code_facts(), "data_digest": data}

    def write(self, record: dict[str, Any], perf: dict[str, float] | None = None) -> None:
        """Append one line; `record` needs "step", everything else is free."""
        if not self._enabled:
            return
        line = {**record, "perf": perf} if perf else record
        text = json.dumps(line).encode() + b"\n"
        with self._writing:
            self._pending += text
        self._length += len(text)
        try:
            faults.inject("metrics.write", record["step"])
            self._flush()
        except OSError as error:
            if not self._warned:
                log.warning(
                    f"metrics.jsonl: could not be written ({error.strerror}); its lines are kept and written later"
                )
            self._warned = True
        values, step = row_of(record, perf), record["step"]
        self._wandb.log(values, step)
        if self._best.update(record):
            self._wandb.summarize(self._best.values)
        if self._board is not None:
            self._board.log(values, step)
        if record.get("skipped", 0) > self._skipped:
            self._skipped = record["skipped"]
            message = f"{self._skipped} steps were skipped so far, the last before step {step}"
            self._wandb.alert(f"{self._wandb.name[:40]}: not finite", message, "WARN")

    def picture(self, name: str, path: Path, step: int) -> None:
        """Send the image file at `path` to Weights & Biases and TensorBoard."""
        if self._enabled:
            self._wandb.picture(name, path, step)
            if self._board is not None:
                self._board.picture(name, path, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send a table to Weights & Biases; a cell may be an `engines.runtime.wandb_run.Picture`."""
        if self._enabled:
            self._wandb.table(name, columns, rows, step)

    def _flush(self) -> None:
        with self._writing:  # called by the training thread and the saving thread
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl, of which some may not have been written yet."""
        return self._length if self._enabled else 0

    def sync(self) -> None:
        """Put all lines safely on disk.

        Raises:
            OSError: the disk is full or fails.
        """
        if self._enabled:
            self._flush()
            os.fsync(self._file.fileno())

    def committed_offset(self) -> int:
        """Bytes of metrics.jsonl, all safely on disk."""
        self.sync()
        return self.length

    def close(self, exit_code: int) -> None:
        """End all logs. Called while an exception passes, it is sent as an alert."""
        if not self._enabled:
            return
        with contextlib.suppress(OSError):  # write() has warned
            self._flush()
        self._file.close()
        if self._board is not None:
            self._board.close()
        error = sys.exception()
        if (
            exit_code not in (0, EXIT_RUN_AGAIN)
            and isinstance(error, Exception)
            and not isinstance(error, Stopped)
        ):
            what = "not finite" if isinstance(error, NonFiniteError) else "failed"
            text = f"{type(error).__name__}: {one_line(error)}; {self._folder}"
            self._wandb.alert(f"{self._wandb.name[:40]}: {what}", text)
        if self._config.artifacts and exit_code == 0:
            record_artifacts(self._wandb, self._folder, self._settings, self._best.values)
        self._wandb.close(exit_code)


def record_artifacts(
    run: WandbRun, folder: Path, settings: Mapping[str, Any], best: Mapping[str, float]
) -> None:
    """Record a run's weights and its shards' manifest in W&B, by reference.

    Args:
        settings: the run's configuration. best: values of its validations, stored with the weights.
    """
    manifest = Path(str(settings.get("data", {}).get("shards", ""))) / "manifest.json"
    if manifest.is_file():
        run.artifact("dataset", {manifest.name: manifest}, {"folder": str(manifest.parent)}, used=True)
    run.artifact("model", _weight_files(folder), {"folder": str(folder), **best}, used=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; a last one that a killed process left in part is not one."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _weight_files(folder: Path) -> dict[str, Path]:
    """A run's weights by name: best.pt and final.safetensors, or a finetuned model's newest checkpoint."""
    found = {name: folder / name for name in ("best.pt", "final.safetensors") if (folder / name).is_file()}
    marked = sorted(
        (folder / "checkpoints").glob("checkpoint-*/complete.json"), key=lambda path: path.stat().st_mtime
    )
    return found or {path.parent.name: path.parent for path in marked[-1:]}


def sweep_run_folder(folder: str) -> str:
    """Where a run started by a W&B agent goes: one folder below the configuration's for each."""
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        return str(Path(folder) / os.environ["WANDB_RUN_ID"])
    return folder
