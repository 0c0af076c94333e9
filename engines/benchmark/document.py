"""A benchmark's results as a JSON document and as tables, and regressions since an earlier run."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dataio.core.errors import UserError, one_line
from engines.benchmark.case import BenchmarkSettings, Group, Result
from engines.benchmark.harness import lines_of
from engines.runtime.versions import commit_of, version_of
from engines.stats.text_table import text_table

_SCHEMA, _VERSION = "telltale-benchmark", 1
_PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "webdataset",
    "triton",
    "transformers",
    "deepspeed",
    "pillow",
    "simplejpeg",
    "timm",
    "numpy",
)


def machine() -> dict[str, Any]:
    """The machine of the measurement, without its host name."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in lines_of("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = next(
        (int(line.split()[1]) for line in lines_of("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Python's, and those of the packages that a measurement depends on."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}}


def document(
    results: Sequence[Result], groups: Sequence[Group], settings: BenchmarkSettings, facts: dict[str, Any]
) -> dict[str, Any]:
    """A whole run as JSON values; `facts` is `machine()` from before the run."""
    if settings.limits is not None:
        facts = {
            **facts,
            "bandwidth_gb_s": round(settings.limits.bandwidth / 1e9, 2),
            "peak_tflops": round(settings.limits.flops / 1e12, 4),
        }
    return {
        "schema": _SCHEMA,
        "version": _VERSION,
        "commit": commit_of(),
        "machine": facts,
        "versions": versions(),
        "command": " ".join(["python", *[os.path.relpath(sys.argv[0]), *sys.argv[1:]]]),
        "settings": {
            key: value for key, value in asdict(settings).items() if key not in ("folder", "limits")
        },
        "results": [{**asdict(result), "median": result.median} for result in results],
        "ratios": ratios(results, groups),
    }


def ratios(results: Sequence[Result], groups: Sequence[Group]) -> dict[str, float]:
    """Speed of telltale's case of a group relative to each other case."""
    speedups: dict[str, float] = {}
    for group in groups:
        medians = {result.case: result.median for result in results if result.group == group.name}
        names = list(medians)
        speedups |= {
            f"{group.name}: {names[0]} / {name}": medians[names[0]] / medians[name] for name in names[1:]
        }
    return speedups


def results_table(written: dict[str, Any]) -> str:
    """A run's document as Markdown."""
    m = written["machine"]
    where = f"{m['cores']} cores of {m['processor']}, {m['memory_gib']:g} GiB" + (
        f", {m['gpus']} x {m['gpu']}" if m["gpu"] else ""
    )
    rows = []
    for r in written["results"]:
        spread = f"{min(r['rates']):,.0f} to {max(r['rates']):,.0f}"
        rows.append(
            [
                r["group"],
                r["case"],
                f"{r['median']:,.0f} ({spread}) {r['unit']}",
                f"{r['cold']:,.0f}",
                f"{1000 * r['cpu_seconds_per_image']:.3g}",
                f"{r['peak_mib']:,.0f}",
                ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in r["extra"].items()),
            ]
        )
    heads = ["group", "case", "per second (lowest to highest)", "cold", "CPU ms each", "peak MiB", "other"]
    ratio_rows = [[name, f"{value:.2f}"] for name, value in written["ratios"].items()]
    return "\n".join(
        [
            f"`{written['command']}`; commit {written['commit'] or 'unknown'}; {where}; "
            f"load before it {m['load_before']:g}.",
            "",
            text_table(rows, heads, markdown=True),
            "",
            text_table(ratio_rows, ["ratio of medians", "times"], markdown=True),
        ]
    )


def read_document(path: str | Path) -> dict[str, Any]:
    """Read the document of an earlier run.

    Raises:
        UserError: the file cannot be read, or is not a benchmark.
    """
    try:
        written = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)[:200]})") from None
    if not isinstance(written, dict) or written.get("schema") != _SCHEMA:
        raise UserError(f"{path}: not a benchmark; give a JSON file of launch/benchmark.py")
    return written


def regressions(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """Cases whose median fell by more than this share, one line each."""
    before = {(r["group"], r["case"]): r["median"] for r in old["results"]}
    lines = []
    for r in new["results"]:
        was = before.get((r["group"], r["case"]))
        if was is not None and r["median"] < was * (1 - tolerance):
            fell = f"{1 - r['median'] / was:.0%} below {was:,.0f}"
            lines.append(f"{r['group']} {r['case']}: {r['median']:,.0f} {r['unit']}/s, {fell}")
    return lines
