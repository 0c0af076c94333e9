"""Runs that are disturbed, and what they must have in common with one that was not."""

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import alive, descendants, differences, environment, flags, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent.parent
STEPS, STEPS_PER_EPOCH = 10, 7
SETTINGS = {
    "model__backbone": "cifarnet_narrow",
    "model__stem": "imagenet",
    "model__head_hidden": 8,
    "model__head_dropout": 0.2,
    "train__ema": 0.9,
    "mix__mixup": 0.2,
    "checkpoint__every": 3,
}


@dataclass
class Run:
    """A run's folder, the folder of its trace, and how to start it."""

    folder: Path
    shards: Path
    changes: dict[str, object]

    @property
    def trace(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-trace")

    def command(self, processes: int, restarts: int = 0) -> list[str]:
        settings = {**SETTINGS, **self.changes}
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}"),
            str(ROOT / "tests" / "integration" / "faults" / "traced_train.py"),
            *flags(data__shards=self.shards, run__dir=self.folder, **settings),
        ]

    def environment(self, faults: str = "") -> dict[str, str]:
        self.trace.mkdir(parents=True, exist_ok=True)
        return {**environment(), "TELLTALE_TRACE": str(self.trace), "TELLTALE_FAULT": faults}

    def go(
        self, processes: int, faults: str = "", restarts: int = 0, timeout: float = 280
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; no process of it may be left then."""
        process = self.start(processes, faults, restarts)
        children: set[int] = set()
        try:
            while process.poll() is None:
                children |= set(descendants(process.pid))
                try:
                    output, errors = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    timeout -= 0.2
                    assert timeout > 0, "the run did not end"
            else:
                output, errors = process.communicate()
        finally:
            process.kill()
        wait_until(lambda: not any(map(alive, children)), 20, "the end of the launcher's processes")
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(self, processes: int, faults: str = "", restarts: int = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(processes, restarts),
            env=self.environment(faults),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without timings."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key != "perf"} for record in records]

    def outcome(self) -> dict[str, Any]:
        return json.loads((self.folder / "exit.json").read_text())

    def checkpoints(self) -> list[int]:
        folder = self.folder / "checkpoints"
        return sorted(int(path.name[5:13]) for path in folder.glob("step_*.pt")) if folder.is_dir() else []

    def batches(self) -> dict[tuple[int, int], set[str]]:
        """What was seen at (step, place); more than one value if a repetition saw something else."""
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        for path in self.trace.iterdir():
            for line in path.read_text().splitlines():
                step, place, seen = line.split(" ", 2)
                found[int(step), int(place)].add(seen)
        return found


def ended_well(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def differing(run: Run, reference: Run) -> list[str]:
    """What of a run is not, bit for bit, as in another."""
    wrong = []
    for name in ("final.safetensors",):
        found, expected = (load_file(one.folder / name) for one in (run, reference))
        wrong += differences(found, expected, name)
    for name in (f"checkpoints/step_{STEPS:08d}.pt", "best.pt"):
        found, expected = (torch.load(one.folder / name, weights_only=True) for one in (run, reference))
        for state in (found, expected):
            state.pop("metrics_offset", None)  # timings are of other lengths
            state.pop("config")  # the folder
        wrong += differences(found, expected, name)
    if run.lines() != reference.lines():
        wrong.append("metrics.jsonl")
    if run.batches() != reference.batches():
        wrong.append("the sequence of samples and crops")
    if run.checkpoints() != reference.checkpoints():
        wrong.append(f"checkpoints of steps {run.checkpoints()}")
    if run.outcome() != reference.outcome():
        wrong.append(f"exit.json: {run.outcome()}")
    if list(run.folder.rglob("*.tmp")):
        wrong.append("temporary files are left")
    return wrong
