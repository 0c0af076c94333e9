"""Parts of a multi-GPU check that its own processes run: NCCL, DDP, CUDA graphs, scaling."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from engines.benchmark.check_ranks import run_ranks
from engines.benchmark.check_report import CheckTask, Reporter

# Of losses, relative: what the tests of one GPU allow fp32 over eight steps.
RUN_TOLERANCE = 1e-3
_STEPS = 8
# The gradient of ResNet-50 is 102 MB.
_SIZES = (2**12, 2**16, 2**20, 2**24, 102_000_000, 2**28, 2**30)


def compare_runs(report: Reporter, what: str, found: Sequence[float], expected: Sequence[float]) -> None:
    """Report the largest relative difference of two runs' losses; an error where it is not rounding."""
    if len(found) != len(expected) or not expected:
        report.failed(what, f"{len(found)} values, expected {len(expected)}")
        return
    if not all(math.isfinite(value) for value in (*found, *expected)):
        report.failed(what, f"not finite: {list(found)}, expected {list(expected)}")
        return
    worst = max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))
    values = {"found": list(found), "expected": list(expected)}
    report.figure(what, worst, "relative", tolerance=RUN_TOLERANCE, **values)
    if worst > RUN_TOLERANCE:
        report.failed(what, f"differ by {worst:.2g}, at most {RUN_TOLERANCE:g} is rounding")


def scaling_counts(gpus: int) -> list[int]:
    """1, 2, 4, ... and `gpus`."""
    return sorted({gpus, *(2**power for power in range(gpus.bit_length()))})


def fewer_counts(gpus: int) -> list[int]:
    """One GPU less than all, which shares no batch evenly, and one; once where these are the same."""
    return sorted({gpus - 1, 1}, reverse=True)


def in_gpus(task: CheckTask, count: int) -> str:
    """A number of GPUs, or of a CPU's processes, in words."""
    one, several = ("GPU", "GPUs") if task.settings.device == "cuda" else ("process", "processes")
    return f"{count} {one if count == 1 else several}"


def measure_nccl(task: CheckTask, report: Reporter) -> None:
    """All-reduces over all GPUs (gloo's on a CPU): bus bandwidth by size."""
    sizes = [size for size in _SIZES if size <= (2**20 if task.tiny else 2**30)]
    found = run_ranks(task, task.gpus, "all-reduce", sizes=sizes)
    for row in found["rows"]:
        report.figure(f"all-reduce, {row['bytes']:,} bytes", row["gb_per_second"], "GB/s", us=row["us"])
    if "peers" in found:
        report.figure("pairs with peer access", found["peers"], f"of {task.gpus * (task.gpus - 1)}")
        version = ".".join(map(str, torch.cuda.nccl.version()))
        report.figure("NCCL", float(".".join(version.split(".")[:2])), "", version=version)


def _losses(task: CheckTask, count: int, graph: str) -> dict[str, Any]:
    return run_ranks(task, count, "losses", steps=3 if task.tiny else _STEPS, graph=graph)


def measure_ddp(task: CheckTask, report: Reporter) -> None:
    """Training under DDP: the losses of one GPU on any number, the same weights on each."""
    alone = _losses(task, 1, "off")
    for count in sorted({task.gpus, *fewer_counts(task.gpus)} - {1}, reverse=True):
        with report.attempt(in_gpus(task, count)):
            found = _losses(task, count, "off")
            compare_runs(report, f"losses, {in_gpus(task, count)} beside 1", found["losses"], alone["losses"])
            # A small rate hides a gradient of the wrong size from the losses.
            what = f"first gradient's norm, {in_gpus(task, count)} beside 1"
            compare_runs(report, what, found["norms"][:1], alone["norms"][:1])
            what = f"spread of weights over {in_gpus(task, count)}"
            report.figure(what, found["spread"], "")
            if found["spread"]:
                report.failed(what, f"weights differ by {found['spread']:.2g} between processes")


def measure_graphs(task: CheckTask, report: Reporter) -> None:
    """Training on all GPUs with and without CUDA graph; a CPU has none and trains twice alike."""
    graph = "on" if task.settings.device == "cuda" else "auto"
    eager, captured = (_losses(task, task.gpus, each) for each in ("off", graph))
    compare_runs(report, f"losses, graph {graph} beside off", captured["losses"], eager["losses"])
    what = f"first gradient's norm, graph {graph} beside off"
    compare_runs(report, what, captured["norms"][:1], eager["norms"][:1])
    for name, found in (("off", eager), (graph, captured)):
        report.figure(f"step in fp32, graph {name}", found["ms"], "ms", **found["how"])


def measure_scaling(task: CheckTask, report: Reporter) -> None:
    """Images/s of the step alone and from shards, as many images for each GPU."""
    one: dict[str, float] = {}
    for count in scaling_counts(task.gpus):
        with report.attempt(in_gpus(task, count)):
            found = run_ranks(task, count, "rates")
            for key, name in (("step", "step alone"), ("shards", "from shards")):
                rate = found[key]
                details = {**found["how"], "each": rate / count}
                if key == "shards":
                    details["data_wait_share"] = found["data_wait_share"]
                report.figure(f"{name}, {in_gpus(task, count)}", rate, "img/s", **details)
                if count == 1:
                    one[key] = rate
                elif key in one:
                    efficiency = 100 * rate / (count * one[key])
                    report.figure(f"{name}, efficiency of {in_gpus(task, count)}", efficiency, "%")
