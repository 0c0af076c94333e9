"""A session of `telltale benchmark`: its groups measured, its goals compared, the results written."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from engines.benchmark import document, goals, harness, memory, roofline
from engines.benchmark.case import BenchmarkSettings
from engines.benchmark.data import draw_images
from engines.benchmark.registry import GROUPS

# Groups whose cases are put beside the limits of the machine.
_WITH_LIMITS = frozenset(["step", "train", "worth"])


@dataclass(frozen=True)
class SessionPlan:
    """What is measured, and with what: see the flags of `telltale benchmark`.

    Attributes:
        groups: names of the registry. gpu_goals: measure what the project's goals name instead.
        data: folder of the images. cifake: folder of CIFAKE's shards, "" for no speed run.
        compare: an earlier JSON file, "" for none. tolerance: share by which a median may fall.
        output: JSON file of the results, "" for none.
    """

    groups: Sequence[str]
    gpu_goals: bool
    data: str
    device: str
    workers: int
    batch: int
    images: int
    small: int
    seconds: float
    repeats: int
    tiny: bool
    cifake: str = ""
    compare: str = ""
    tolerance: float = 0.15
    output: str = ""


def run_session(plan: SessionPlan) -> int:
    """Measure, print the tables, write the file.

    Returns:
        1 where a median fell by more than the tolerance or a goal's floor is missed, else 0.

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
    if plan.gpu_goals:
        results = goals.measure_goals(settings, repeats, _say)
        rows = goals.compare_with_goals(results, gpu=plan.device == "cuda")
        if plan.cifake:
            rows.append(goals.run_cifake(plan.cifake, Path(settings.folder), plan.device, _say))
        rows.append(goals.run_gpu_tests(_say))
    else:
        results, rows = [r for group in groups for r in harness.run_group(group, settings, repeats, _say)], []
    written = document.document(results, groups, settings, facts)
    print(document.results_table(written))
    if plan.gpu_goals:
        written["goals"] = rows
        print("\n" + goals.goals_table(rows))
    _write(plan.output, written)
    if plan.gpu_goals:
        return 1 if any(row["met"] == "no" for row in rows) else 0
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
