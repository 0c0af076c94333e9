"""The record of a run: metrics.jsonl, and Weights & Biases as a copy.

Each line of metrics.jsonl has reproducible values at its top level and timings under "perf". A
checkpoint stores the file's length, and resuming truncates to it, so the file of a run that was
killed ten times equals that of an uninterrupted run (except for "perf").
"""

import contextlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataio.core.log import log
from engines.runtime import fault_injection as faults


@dataclass(kw_only=True)
class LogConfig:
    """What is written while the run goes."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is WANDB_MODE's, else online where a key is configured, else offline."""
    project: str = "telltale"
    """Weights & Biases project."""
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
        wandb_id: the W&B run to continue, "" for a new one.
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
    ) -> None:
        self._enabled = enabled
        self._wandb: Any = None
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
        self._start_wandb(folder, config, settings)

    def _start_wandb(self, folder: Path, config: LogConfig, settings: dict[str, Any]) -> None:
        if config.wandb == "off":
            return
        with self._failure_as_warning("starting Weights & Biases"):
            import wandb

            mode: Any = config.wandb
            if mode == "auto":
                key = os.environ.get("WANDB_API_KEY") or _has_netrc_key()
                # An argument beats the environment in W&B, so the environment is asked here.
                mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
            self._wandb = wandb.init(
                project=config.project,
                name=folder.name,
                dir=str(folder),
                id=self.wandb_id or None,
                resume="allow",
                mode=mode,
                config=settings,
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.wandb_id = self._wandb.id

    @contextlib.contextmanager
    def _failure_as_warning(self, what: str) -> Any:
        """Turn a failure of Weights & Biases into one warning; it never stops a run."""
        try:
            yield
        except Exception as error:
            log.warning(f"{what} failed ({error}); going on without it")
            self._wandb = None

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
        if self._wandb is not None:
            with self._failure_as_warning("logging to Weights & Biases"):
                values = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
                values.update({f"perf/{k}": v for k, v in (perf or {}).items()})
                self._wandb.log(values, step=record["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """Send the image file at `path` to Weights & Biases."""
        if self._enabled and self._wandb is not None:
            with self._failure_as_warning("sending an image to Weights & Biases"):
                import wandb

                self._wandb.log({f"images/{name}": wandb.Image(str(path))}, step=step)

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
        if not self._enabled:
            return
        with contextlib.suppress(OSError):  # write() has warned
            self._flush()
        self._file.close()
        if self._wandb is not None:
            with self._failure_as_warning("closing Weights & Biases"):
                self._wandb.finish(exit_code=exit_code)


def _has_netrc_key() -> bool:
    import netrc

    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


def sweep_run_folder(folder: str) -> str:
    """Where a run started by a W&B agent goes: one folder below the configuration's for each."""
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        return str(Path(folder) / os.environ["WANDB_RUN_ID"])
    return folder
