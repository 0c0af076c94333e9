"""A trace of some steps of a run, for chrome://tracing or Perfetto."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig

from dataio.core.atomic import write_with
from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.loading.trace import trace_ranges
from engines.runtime.distributed import World

_REDUCES = re.compile(r"(gloo|nccl):all_?reduce")


class StepProfile:
    """Traces the chosen steps of this process into RUN/profile/rankN.json.gz.

    Ranges besides PyTorch's operators: read (bytes of the next batch), augment (its crops and
    augmentation parameters; mixing), decode (waiting for DALI, whose threads decode, resize and
    normalize; `read` and `augment` are called from within), forward, backward, all-reduce (on a
    thread or stream for communication: it overlaps with backward), optimizer.

    Args:
        steps: to trace, from 0; may be empty. total: steps of the run.

    Raises:
        UserError: the run has no such steps.
    """

    def __init__(self, steps: range, total: int, folder: Path, world: World) -> None:
        self._steps, self._folder, self._world = steps, folder, world
        if steps and steps.stop > total:
            raise UserError(
                f"train.profile is {steps.start}:{steps.stop}, but the run has {total} steps, counted from 0; "
                "choose some of them"
            )
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start tracing if `step`, the next to be done, is among the steps to trace."""
        if self._profiler is None and step in self._steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            # Of all threads: the loader reads and decodes in one of its own.
            options = _ExperimentalConfig(profile_all_threads=True)
            self._profiler = torch.profiler.profile(activities=activities, experimental_config=options)
            trace_ranges(True)
            self._profiler.start()

    def after(self, step: int) -> Path | None:
        """Write the trace if all its steps are done; returns its path.

        Args:
            step: the next to be done.
        """
        return self.close() if self._profiler is not None and step not in self._steps else None

    def close(self) -> Path | None:
        """Write the trace, if any; a failed write only warns. Returns its path."""
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        trace_ranges(False)
        path = self._folder / "profile" / f"rank{self._world.rank}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_with(path, lambda temporary: _export(profiler, temporary))
        except OSError as error:
            log.warning(f"{path}: could not be written ({error.strerror})")
            return None
        return path


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    plain = path.with_name(f"{path.name}.json")
    try:
        profiler.export_chrome_trace(str(plain))
        trace: dict[str, Any] = json.loads(plain.read_text())
    finally:
        plain.unlink(missing_ok=True)
    for event in trace["traceEvents"]:
        # The same name for all backends; the original name stays in its arguments.
        if _REDUCES.fullmatch(event.get("name", "")):
            event.setdefault("args", {})["backend"] = event["name"]
            event["name"] = "all-reduce"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(trace, file)
