"""Parts of a GPU check that run other programs: tests, the speed run, finetuning, peers."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from engines.benchmark.check_report import CheckTask, Reporter
from engines.benchmark.goals import CIFAKE_ERROR
from engines.benchmark.harness import run_group
from engines.benchmark.peers_dali import train_dali
from engines.benchmark.peers_train import step_timm, step_torchvision, train_timm, train_torchvision
from engines.benchmark.registry import GROUPS
from engines.runtime.paths import CONFIGS, ROOT

_UPSTREAM = "Hugging Face Trainer, upstream's recipe"
# With -v, and by several workers, each test's line has its outcome and the share that is done.
_OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL).*%\]|%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL)")


def measure_tests(task: CheckTask, report: Reporter) -> None:
    """tests/gpu, on four workers where there is a GPU; a failure is reported when it comes."""
    folder = ROOT / "tests" / "gpu"
    if not folder.is_dir():
        raise UserError(f"{folder}: not there; run from a checkout, an installed package has no tests")
    command = [sys.executable, "-m", "pytest", str(folder), "-v", "-p", "no:cacheprovider"]
    command += ["-n", "4" if task.settings.device == "cuda" else "0", "--dist", "worksteal"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    counts: Counter[str] = Counter()
    lines = []
    for line in process.stdout:
        lines.append(line)
        sys.stdout.write(line)
        if found := _OUTCOME.search(line):
            outcome = found[1] or found[2]
            counts[outcome] += 1
            if outcome in ("FAILED", "ERROR"):
                report.failed(" ".join(re.findall(r"\S+::\S+", line)), "see the log")
    code = process.wait()
    for outcome in ("PASSED", "FAILED", "SKIPPED"):
        report.figure(outcome.lower(), counts[outcome], "tests")
    if code and not counts["FAILED"] + counts["ERROR"]:
        report.failed("pytest", f"ended with code {code}: {''.join(lines)[-400:]}")


# ---- the speed run ----------------------------------------------------------------------------


def time_to_error(lines: Sequence[Mapping[str, Any]], error: float) -> float | None:
    """Seconds of training, validation too, until real/fake error is below `error`; None: never.

    Args:
        lines: of metrics.jsonl.
    """
    seconds = 0.0
    for line in lines:
        seconds += line.get("perf", {}).get("seconds", 0.0)
        measured = line.get("real_fake_error")
        if line["kind"] == "val" and measured is not None and measured < error:
            return seconds
    return None


def measure_cifake(task: CheckTask, report: Reporter) -> None:
    """The speed run's configuration on one GPU, until validation's real/fake error is low; decoding counts."""
    shards = Path(task.settings.folder) / "small" if task.tiny else Path(task.cifake)
    if not task.tiny and not task.cifake:
        raise UserError("no shards of CIFAKE were given: add --cifake FOLDER (make gpu-check CIFAKE=FOLDER)")
    if not (shards / "manifest.json").is_file():
        raise UserError(
            f"--cifake {shards}: no manifest.json there; give a folder that launch/shard.py wrote"
        )
    batch = 64 if task.tiny else 512
    run = Path(task.settings.folder) / f"cifake-{time.time_ns()}"
    flags = {
        "data.shards": shards,
        "run.dir": run,
        "model.backbone": "cifarnet",
        "train.global_batch": batch,
        "train.micro_batch": batch,
        "optim.lr": 0.4,
        "log.wandb": "off",
        **({"train.steps": 4, "train.threads": task.settings.workers} if task.tiny else {}),
    }
    command = [sys.executable, str(ROOT / "launch/train.py")]
    command += ["--config", str(CONFIGS / "cifake_speedrun.yaml")]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    whole = time.perf_counter() - begin
    sys.stdout.write(done.stdout)
    decoded = re.search(r"decoded in ([\d.]+) s", done.stdout)
    if done.returncode or decoded is None:
        raise RuntimeError(f"launch/train.py ended with code {done.returncode}: {done.stdout[-400:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line["real_fake_error"] for line in lines if line["kind"] == "val"]
    decoding = float(decoded[1])
    report.figure("decoding", decoding, "s")
    report.figure("whole command", whole, "s")
    report.figure("real/fake error", validations[-1], "")
    # A tiny run learns nothing.
    seconds = time_to_error(lines, 1.1 if task.tiny else CIFAKE_ERROR)
    if seconds is None:
        report.failed("seconds to the error", f"real/fake error on validation ended at {validations[-1]:.2%}")
    else:
        report.figure("seconds to the error", decoding + seconds, "s", training_and_validation=seconds)


# ---- others -----------------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def measure_finetuning(task: CheckTask, report: Reporter) -> None:
    """Tokens/s of our trainer and of Hugging Face's under upstream's recipe."""
    group = GROUPS["finetune"]
    # An image takes a worker 13 ms: more of them are never needed.
    settings = replace(task.settings, workers=min(8, task.settings.workers))
    if not task.tiny:
        settings = replace(settings, seconds=4.0)  # a step of the 3.1 B model takes that long
    rates = {}
    for name in ("telltale", _UPSTREAM):
        with report.attempt(name):
            alone = replace(group, cases={name: group.cases[name]})
            for result in run_group(alone, settings, 1, _say):
                rates[name] = result.extra["tokens_per_second"]
                report.figure(name, rates[name], "tokens/s", **result.extra)
    if len(rates) < 2:
        raise RuntimeError("a case could not run here; see the log")
    report.figure("beside upstream", rates["telltale"] / rates[_UPSTREAM], "")


def measure_peers(task: CheckTask, report: Reporter) -> None:
    """Others' loops on the same network and images; the parts `step` and `tars` have ours."""
    # Those whose workers are forked come first, before DALI's threads are there.
    cases = {
        "timm's recipe, create_loader": train_timm,
        "torchvision's recipe, DataLoader": train_torchvision,
        "timm's step": step_timm,
        "torchvision's step": step_torchvision,
        "DALI and plain PyTorch": train_dali,
    }
    for name, case in cases.items():
        with report.attempt(name), case(task.settings) as once:
            once()
            rates = [run.images / run.seconds for run in (once() for _ in range(task.repeats))]
            report.figure(name, statistics.median(rates), "img/s", rates=rates)
