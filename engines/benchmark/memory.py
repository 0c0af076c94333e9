"""Peak memory of sharding and predicting, and its growth with the number of files."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from dataio.images.codec import preset_policy
from dataio.layouts.synthetic import write_synthetic
from engines.benchmark.harness import family_peak_mib
from engines.runtime.paths import ROOT
from engines.stats.text_table import text_table

_SIDE = 32
_LOOK = 0.02  # seconds between readings


def peak_mib(pid: int, running: Callable[[], bool]) -> float:
    """Resident memory at its peak of a process or the largest of its descendants, MiB.

    From the kernel's high-water mark, read every 20 ms: an allocation in a process's last
    moments may be missed. Returns when `running` no longer holds.
    """
    peak = 0.0
    while running():
        peak = max(peak, family_peak_mib(pid))
        time.sleep(_LOOK)
    return peak


def _watch(*words: str) -> float:
    """Peak of a launch command, MiB.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, str(ROOT / "launch" / words[0]), *words[1:]]
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peak = peak_mib(process.pid, lambda: process.poll() is None)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{words[0]}: {errors.read().strip()[-500:]}")
    return peak


def _source(folder: Path, files: int, say: Callable[[str], None]) -> Path:
    say(f"drawing {files} images of {_SIDE} px")
    write_synthetic(folder / f"source-{files}", images=files, size=_SIDE)
    return folder / f"source-{files}"


def shard_memory(folder: Path, counts: Sequence[int], say: Callable[[str], None]) -> list[dict[str, float]]:
    """Peak memory of launch/shard.py's work for each number of tiny files, MiB.

    Done as two tasks and a merge, so that writing is seen apart from the plan.

    Returns:
        rows of files, imports_mib (--help), plan_mib (the first task: lists and permutes the files,
        writes half of the shards), write_mib (the second, which finds the plan), merge_mib (--finish).
    """
    rows = []
    for files in counts:
        source = _source(folder, files, say)
        with TemporaryDirectory(dir=folder) as name:
            words = [
                "shard.py",
                "--layout",
                "genimage",
                "--source",
                str(source),
                "--output",
                f"{name}/shards",
            ]
            words += ["--val-fraction", "0.1", "--codec.size", str(_SIDE), "--workers", "2"]
            words += ["--samples-per-shard", "500", "--allow-duplicates"]
            row = {
                "files": files,
                "imports_mib": _watch("shard.py", "--help"),
                "plan_mib": _watch(*words, "--task", "0/2"),
                "write_mib": _watch(*words, "--task", "1/2"),
                "merge_mib": _watch(*words, "--finish"),
            }
        say(f"shard-memory, {files} files: plan {row['plan_mib']:.0f}, writing {row['write_mib']:.0f} MiB")
        rows.append(row)
    return rows


def predict_memory(folder: Path, counts: Sequence[int], say: Callable[[str], None]) -> list[dict[str, float]]:
    """Peak memory of launch/predict.py on folders of each number of tiny files, to CSV; MiB.

    Returns:
        rows of files and predict_mib.
    """
    checkpoint = folder / "random.pt"
    write_random_detector(
        checkpoint, {"model": {"backbone": "cifarnet_narrow"}, "data": {"size": _SIDE, "eval_crop": 1.0}}
    )
    rows = []
    for files in counts:
        source = _source(folder, files, say)
        output = folder / "predictions.csv"
        words = ["predict.py", "--checkpoint", str(checkpoint), "--output", str(output), str(source)]
        peak = _watch(*words)
        with open(output, "rb") as file:
            written = sum(1 for _ in file) - 1
        if written != files:
            raise RuntimeError(f"predict.py wrote {written} rows for {files} files")
        say(f"predict-memory, {files} files: {peak:.0f} MiB")
        rows.append({"files": files, "predict_mib": peak})
    return rows


def write_random_detector(path: Path, config: dict[str, Any]) -> None:
    """A checkpoint with random weights.

    Args:
        config: a detector's configuration as plain values; what is left out has its default.
    """
    import torch

    from engines.checkpoint import files as checkpoints
    from engines.config.detector import from_dict
    from models.detector.dual_head import DualHead

    parsed = from_dict(config)
    torch.manual_seed(0)
    labels = {"generators": ["nature", "adm"], "objects": ["thing"]}
    model = DualHead(parsed.model, labels["generators"], labels["objects"])
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 1,
        "model": checkpoints.cpu_state(model),
        "labels": labels,
        "codec": preset_policy("default", _SIDE if parsed.data.size < 224 else 256).to_dict(),
        "layout": "genimage",
        "config": config,
    }
    checkpoints.save(path, state)


def peak_memory_table(rows: Sequence[dict[str, float]]) -> str:
    """The rows as Markdown, with what a file more costs between the first and the last."""
    names = list(rows[0])
    cells = [[f"{row[name]:,.0f}" for name in names] for row in rows]
    if len(rows) > 1:
        files = rows[-1]["files"] - rows[0]["files"]
        growth = [f"{(rows[-1][name] - rows[0][name]) * 2**20 / files:,.0f} bytes" for name in names[1:]]
        cells.append(["each file more", *growth])
    heads = [name.replace("_mib", ", MiB") for name in names]
    return text_table(cells, heads, markdown=True, align="r" * len(names))
