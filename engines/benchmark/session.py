"""A session of `telltale benchmark`: its groups measured, the results written."""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from engines.benchmark import document, harness, memory, roofline
from engines.benchmark.case import BenchmarkSettings
from engines.benchmark.check_run import CheckPlan, run_check
from engines.benchmark.data import draw_images
from engines.benchmark.registry import GROUPS

# Groups whose cases are put beside the limits of the machine.
_WITH_LIMITS = frozenset(["step", "train", "worth"])
# Of a multi-GPU check: its batches have eight parts.
FEWEST_GPUS, MOST_GPUS = 2, 8


@dataclass(frozen=True)
class SessionPlan:
    """What is measured, and with what: see the flags of `telltale benchmark`.

    Attributes:
        groups: names of the registry. data: folder of the images.
        compare: an earlier JSON file, "" for none. tolerance: share by which a median may fall.
        output: JSON file of the results, "" for none.
    """

    groups: Sequence[str]
    data: str
    device: str
    workers: int
    batch: int
    images: int
    small: int
    seconds: float
    repeats: int
    tiny: bool
    compare: str = ""
    tolerance: float = 0.15
    output: str = ""


def run_session(plan: SessionPlan) -> int:
    """Measure, print the tables, write the file.

    Returns:
        1 where a median fell by more than the tolerance, else 0.

    Raises:
        UserError: no GPU, or a file that cannot be read.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; use cpu", field="device", value="cuda")
    old = document.read_document(plan.compare) if plan.compare else None
    facts, settings = document.machine(), _settings(plan)
    _say(f"drawing and sharding {settings.images} and {settings.small} images in {settings.folder}")
    draw_images(settings)
    groups, repeats = [GROUPS[name] for name in plan.groups], 1 if plan.tiny else plan.repeats
    results = [r for group in groups for r in harness.run_group(group, settings, repeats, _say)]
    written = document.document(results, groups, settings, facts)
    print(document.results_table(written))
    _write(plan.output, written)
    if old is None:
        return 0
    slower = document.regressions(old, written, plan.tolerance)
    print(f"\ncompared with {plan.compare}: {'; '.join(slower) or 'nothing is slower than the tolerance'}")
    return 1 if slower else 0


def run_memory(groups: Sequence[str], counts: Sequence[int], data: str, output: str) -> None:
    """Measure the peak memory of shard-memory and predict-memory by number of files."""
    folder = Path(data) / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": document.machine()}
    for name in groups:
        results[name] = getattr(memory, name.replace("-", "_"))(folder, list(counts), _say)
        print(f"{name}\n\n{memory.peak_memory_table(results[name])}\n")
    _write(output, results)


def run_gpu_check(plan: CheckPlan) -> int:
    """Run a check of one GPU or of several, each figure printed as it comes; see `run_check`."""
    # An exception, so that the part that runs is ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    code = run_check(plan, lambda text: print(text, flush=True))
    if plan.output:
        print(f"\nresults: {plan.output}")
    return code


def gpus_to_check(requested: int, device: str) -> int:
    """How many GPUs, or processes on a CPU, a multi-GPU check takes.

    Args:
        requested: 0 for all, at most 8; two processes on a CPU.

    Raises:
        UserError: fewer than two, more than eight, or more than there are.
    """
    if device == "cpu":
        count = requested or FEWEST_GPUS
    elif not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; use cpu", field="device", value="cuda")
    else:
        seen = torch.cuda.device_count()
        if seen < FEWEST_GPUS:
            raise UserError("PyTorch sees 1 GPU here, a multi-GPU check needs 2 at least; use gpu-check")
        if requested > seen:
            raise UserError(f"--gpus is {requested}, but PyTorch sees {seen} here; give at most that")
        count = requested or min(seen, MOST_GPUS)
    if not FEWEST_GPUS <= count <= MOST_GPUS:
        raise UserError(f"--gpus is {count}, expected {FEWEST_GPUS} to {MOST_GPUS}")
    return count


def _settings(plan: SessionPlan) -> BenchmarkSettings:
    keys = ("device", "workers", "batch", "images", "small", "seconds")
    values = {key: getattr(plan, key) for key in keys}
    if plan.tiny:
        values |= {"images": 150, "small": 400, "batch": 16, "seconds": 0.1}
    limits = None
    if _WITH_LIMITS & set(plan.groups):
        _say("measuring memory and arithmetic")
        precision = "bf16" if plan.device == "cuda" else "fp32"
        limits = roofline.measure_limits(plan.device, precision, plan.workers)
    folder = Path(plan.data) / f"{values['images']}-{values['small']}"
    return BenchmarkSettings(folder=str(folder), limits=limits, **values)


def _write(output: str, results: Any) -> None:
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results, indent=1) + "\n")
        print(f"\nresults: {path}")


def _say(text: str) -> None:
    print(f"benchmark: {text}", file=sys.stderr, flush=True)
