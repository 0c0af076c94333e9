"""Parts of a multi-GPU check that run the commands: both launchers, and resume on fewer processes."""

import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from dataio.core.errors import UserError
from engines.benchmark.check_multi import compare_runs, fewer_counts, in_gpus
from engines.benchmark.check_ranks import run_program, torchrun
from engines.benchmark.check_report import CheckTask, Reporter
from engines.runtime.command import EXIT_RUN_AGAIN
from engines.runtime.paths import CONFIGS, ROOT


def _words(settings: dict[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def _logged(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of the training lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def _losses(run: Path, steps: int) -> list[float]:
    """The losses of a finished run's steps, each once and in their order.

    Raises:
        RuntimeError: steps are missing or doubled.
    """
    logged = _logged(run)
    if [step for step, _ in logged] != list(range(1, steps + 1)):
        raise RuntimeError(f"{run / 'metrics.jsonl'} has steps {[step for step, _ in logged]}")
    return [loss for _, loss in logged]


# ---- the commands -----------------------------------------------------------------------------


def _train(task: CheckTask, count: int, run: Path, steps: int) -> int:
    """Train a small network by torchrun on images of 32 px, so that rounding stays small; the code in exit.json."""
    settings: dict[str, object] = {
        "data.shards": Path(task.settings.folder) / "small",
        "data.synthetic.images": 0,
        "data.size": 24,
        "data.deterministic": True,
        "data.threads": 1,
        "train.steps": steps,
        # A micro-batch at least for each of eight GPUs.
        "train.global_batch": 64,
        "train.micro_batch": 8,
        "train.pass_images": 8,
        "train.precision": "fp32",
        "train.timeout": 2,
        "train.validate_every": steps,
        "optim.lr": 1e-4,
        "checkpoint.best": "loss",
        "log.every": 1,
        "log.wandb": "off",
        "run.dir": run,
    }
    config = ["--config", str(CONFIGS / "quickstart.yaml")]
    command = [*torchrun(count), str(ROOT / "launch/train.py"), *config, *_words(settings)]
    # torchrun has one code for all failures, and a run that stopped on request is one to it.
    output = run_program(command, env={**os.environ, "TELLTALE_VERDICT": "file"})
    _check_processes(task, count, output)
    code: int = json.loads((run / "exit.json").read_text())["code"]
    return code


def _finetune(task: CheckTask, count: int, folder: Path, run: Path, steps: int) -> None:
    """Finetune the quickstart's tiny model by deepspeed, on conversations drawn in `folder`."""
    settings: dict[str, object] = {
        "data.conversations": folder / "conversations.json",
        "data.val": folder / "val.json",
        "data.generate.images": 200,
        "data.generate.questions": 100,
        "data.generate.val": 8,
        "data.generate.benchmark": 8,
        "model.precision": "fp32",
        "optim.lr": 1e-3,
        "train.steps": steps,
        "train.micro_batch": 2,
        "evaluate.benchmarks": "[]",
        "log.every": 1,
        "log.wandb": "off",
        "run.dir": run,
    }
    launcher = Path(sys.executable).with_name("deepspeed")
    program = str(launcher) if launcher.is_file() else shutil.which("deepspeed")
    if program is None:
        raise UserError("the program deepspeed is not there; install telltale with its requirements")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = ["--config", str(CONFIGS / "tinyllava_quickstart.yaml")]
    environment, start = dict(os.environ), [program, "--master_port", port]
    if task.settings.device == "cuda":
        # Beside --num_gpus it ignores this variable, and takes GPUs that may be others'.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = first_devices(visible, count)
    else:
        start += ["--num_gpus", str(count)]
    # It starts the `python` of PATH's first folder.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [*start, str(ROOT / "launch/finetune_mlm.py"), *config, *_words(settings)]
    _check_processes(task, count, run_program(command, env=environment))


def first_devices(visible: str, count: int) -> str:
    """The first so many GPUs of CUDA_VISIBLE_DEVICES, "" for all of the machine.

    Raises:
        UserError: it has names, which deepspeed's launcher does not know.
    """
    devices = [device.strip() for device in visible.split(",")] if visible else list(map(str, range(count)))
    if not all(device.isdigit() for device in devices):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {visible}, expected numbers: deepspeed's launcher knows GPUs by number alone"
        )
    return ",".join(devices[:count])


def _check_processes(task: CheckTask, count: int, output: str) -> None:
    """Both commands print how many processes they are: a launcher may start others than it was asked for."""
    expected = f"{count} x {task.settings.device}"
    if f" {expected}, " not in output:
        raise RuntimeError(f"the command did not say that it runs on {expected}; see the log")


# ---- the parts --------------------------------------------------------------------------------


def measure_launchers(task: CheckTask, report: Reporter) -> None:
    """Each command to its end on one GPU and on all, with equal losses."""
    steps = 3 if task.tiny else 8
    with tempfile.TemporaryDirectory(dir=task.settings.folder) as name:
        folder = Path(name)
        with report.attempt("torchrun launch/train.py"):
            runs = {count: folder / f"train-{count}" for count in (task.gpus, 1)}
            for count, run in runs.items():
                _train(task, count, run, steps)
            found, alone = (_losses(run, steps) for run in runs.values())
            what = f"torchrun launch/train.py, {in_gpus(task, task.gpus)} beside 1"
            compare_runs(report, what, found, alone)
        with report.attempt("deepspeed launch/finetune_mlm.py"):
            runs = {count: folder / f"finetune-{count}" for count in (task.gpus, 1)}
            for count, run in runs.items():
                _finetune(task, count, folder, run, steps)
            found, alone = (_losses(run, steps) for run in runs.values())
            what = f"deepspeed launch/finetune_mlm.py, {in_gpus(task, task.gpus)} beside 1"
            compare_runs(report, what, found, alone)


def measure_resume(task: CheckTask, report: Reporter) -> None:
    """Train on all GPUs, stop, go on with one GPU less and with one; the losses are those of a run not stopped."""
    # A run looks for the stop file after step 10 on a GPU, after step 1 on a CPU.
    steps = 20 if task.settings.device == "cuda" else 4
    with tempfile.TemporaryDirectory(dir=task.settings.folder) as name:
        whole, stopped = Path(name) / "whole", Path(name) / "stopped"
        _train(task, task.gpus, whole, steps)
        expected = _losses(whole, steps)
        stopped.mkdir()
        (stopped / "stop").write_text("the multi-GPU check\n")
        code = _train(task, task.gpus, stopped, steps)
        before = len(_logged(stopped))
        if code != EXIT_RUN_AGAIN or not 0 < before < steps:
            raise RuntimeError(f"asked to stop, it ended with code {code} after {before} of {steps} steps")
        report.figure("stopped after", before, "steps")
        for count in fewer_counts(task.gpus):
            with report.attempt(f"continued on {in_gpus(task, count)}"):
                run = Path(name) / f"continued-{count}"
                shutil.copytree(stopped, run)
                _train(task, count, run, steps)
                what = f"continued on {in_gpus(task, count)} beside {in_gpus(task, task.gpus)} throughout"
                compare_runs(report, what, _losses(run, steps), expected)
