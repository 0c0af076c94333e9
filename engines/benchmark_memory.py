"""How much memory sharding and predicting take, and whether it grows with the number of files."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dataio.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.plan import make_plan
from dataio.shards import Job, run_job
from engines.benchmark import family, lines_of

ROOT = Path(__file__).resolve().parent.parent
_SIDE = 32
_LOOK = 0.02  # seconds between looks


def peak_mib(pid: int, running: Callable[[], bool]) -> float:
    """Resident memory at its peak of a process or the largest of its descendants, MiB.

    From the kernel's own high-water mark, read every 20 ms: what a process takes in its last
    moments may be missed. Returns when `running` no longer holds.
    """
    peak = 0
    while running():
        for folder in family(pid):
            marks = [line for line in lines_of(str(folder / "status")) if line.startswith("VmHWM")]
            peak = max([peak, *(int(line.split()[1]) for line in marks)])
        time.sleep(_LOOK)
    return peak / 1024


def _watch(target: Callable[..., None], *arguments: Any) -> float:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    peak = peak_mib(process.pid or 0, process.is_alive)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{target.__name__} ended with code {process.exitcode}")
    return peak


def _job(source: Path, output: Path) -> Job:
    # Two processes: one would write in the process that also made the plan.
    layout = GenImageLayout(source, val_fraction=0.1)
    policy = preset_policy("default", _SIDE)
    return Job(layout, output, policy, workers=2, quiet=True, allow_duplicates=True)


def _plan(source: Path, output: Path) -> None:
    job = _job(source, output)
    job.work.mkdir(parents=True)
    # With the source, as `run_job` compares it before it goes on with a plan.
    make_plan(job.layout, job.work, job.policy, {**job.settings, "source": job.layout.root})


def _write(source: Path, output: Path) -> None:
    run_job(_job(source, output))


def _nothing(source: Path, output: Path) -> None:
    """What the imports alone take."""


def _source(folder: Path, files: int, say: Callable[[str], None]) -> Path:
    say(f"drawing {files} images of {_SIDE} px")
    write_synthetic(folder / f"source-{files}", images=files, size=_SIDE)
    return folder / f"source-{files}"


def shard_memory(folder: Path, counts: Sequence[int], say: Callable[[str], None]) -> list[dict[str, float]]:
    """Peak memory of launch/shard.py's work for each number of tiny files, MiB.

    Returns:
        rows of files, imports_mib (of a process that does nothing), plan_mib (that lists and
        permutes the files), write_mib (the largest of those that write and merge, plan given).
    """
    rows = []
    for files in counts:
        source = _source(folder, files, say)
        with TemporaryDirectory(dir=folder) as name:
            output = Path(name) / "shards"
            row = {"files": files, "imports_mib": _watch(_nothing, source, output)}
            row["plan_mib"] = _watch(_plan, source, output)
            row["write_mib"] = _watch(_write, source, output)
        say(f"shard-memory, {files} files: plan {row['plan_mib']:.0f}, writing {row['write_mib']:.0f} MiB")
        rows.append(row)
    return rows


def predict_memory(folder: Path, counts: Sequence[int], say: Callable[[str], None]) -> list[dict[str, float]]:
    """Peak memory of launch/predict.py on folders of each number of tiny files, to CSV; MiB.

    Returns:
        rows of files and predict_mib.
    """
    checkpoint = folder / "random.pt"
    _write_detector(checkpoint)
    rows = []
    for files in counts:
        source = _source(folder, files, say)
        output = folder / "predictions.csv"
        command = [sys.executable, str(ROOT / "launch/predict.py"), "--checkpoint", str(checkpoint)]
        process = subprocess.Popen(
            [*command, "--output", str(output), str(source)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        peak = peak_mib(process.pid, lambda process=process: process.poll() is None)  # type: ignore[misc]
        assert process.stderr is not None
        if process.returncode != 0:
            raise RuntimeError(f"predict.py: {process.stderr.read().strip()[-500:]}")
        with open(output, "rb") as file:
            written = sum(1 for _ in file) - 1
        if written != files:
            raise RuntimeError(f"predict.py wrote {written} rows for {files} files")
        say(f"predict-memory, {files} files: {peak:.0f} MiB")
        rows.append({"files": files, "predict_mib": peak})
    return rows


def _write_detector(path: Path) -> None:
    """A checkpoint of a small network with random weights."""
    import torch

    from engines import checkpoints
    from engines.config import from_dict
    from models.dual_head import DualHead

    config = {"model": {"backbone": "cifarnet_narrow"}, "data": {"size": _SIDE, "eval_crop": 1.0}}
    torch.manual_seed(0)
    labels = {"generators": ["nature", "adm"], "objects": ["thing"]}
    model = DualHead(from_dict(config).model, labels["generators"], labels["objects"])
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 1,
        "model": checkpoints.cpu_state(model),
        "labels": labels,
        "codec": preset_policy("default", _SIDE).to_dict(),
        "layout": "genimage",
        "config": config,
    }
    checkpoints.save(path, state)


def table(rows: Sequence[dict[str, float]]) -> str:
    """The rows as Markdown, with what a file more costs between the first and the last."""
    names = list(rows[0])
    lines = [f"| {' | '.join(name.replace('_mib', ', MiB') for name in names)} |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(f"{row[name]:,.0f}" for name in names) + " |" for row in rows]
    if len(rows) > 1:
        more = rows[-1]["files"] - rows[0]["files"]
        grown = (f"{(rows[-1][name] - rows[0][name]) * 2**20 / more:,.0f} bytes" for name in names[1:])
        lines.append(f"| each file more | {' | '.join(grown)} |")
    return "\n".join(lines)
