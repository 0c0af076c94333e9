"""Parts of a GPU check that train: the step alone, from tars, ghost batches, augmentation, checkpoints."""

import gc
import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataio.loading.augment import AugmentConfig
from dataio.shards.shard_set import ShardSet
from engines.benchmark.cases_checkpoint import measure_saves
from engines.benchmark.cases_train import training_steps
from engines.benchmark.check_report import CheckTask, Reporter
from engines.benchmark.detector import detector_config, world_of
from engines.benchmark.harness import family_cpu_seconds
from engines.config.detector import Config
from engines.train.trainer import Trainer
from models.detector.norms.ghost_modules import GhostNorm

# Every image goes through each of them.
DEGRADATIONS = AugmentConfig(jpeg=1.0, blur=1.0, resize=1.0, erase=1.0)


def _trainer(task: CheckTask, config: Config, *, plain_norms: bool = False) -> Trainer:
    trainer = Trainer(config, world_of(task.settings), ShardSet(config.data.shards, "train"), None)
    if plain_norms:
        for module in trainer.model.modules():
            if isinstance(module, GhostNorm):
                module.path = "plain"
    return trainer


def _train(task: CheckTask, **changes: Any) -> Config:
    """The configuration of the cases with other keys of `train`."""
    config = detector_config(task.settings)
    return replace(config, train=replace(config.train, **changes))


def _rate(trainer: Trainer, task: CheckTask, *, in_memory: bool = False) -> tuple[float, dict[str, Any]]:
    """Median images/s of some windows after a cold one, and what explains it.

    Args:
        in_memory: repeat the first batch, without a loader.
    """
    if in_memory:
        trainer.use_batches(itertools.repeat(next(trainer.batches())))
    once = training_steps(trainer, task.settings)
    # As a run does; see engines/train/loop.py.
    gc.collect()
    gc.freeze()
    once()
    begin, cpu = time.perf_counter(), family_cpu_seconds()
    runs = [once() for _ in range(task.repeats)]
    cores = (family_cpu_seconds() - cpu) / (time.perf_counter() - begin)
    gc.unfreeze()  # the next trainer needs this one's memory
    rates = [run.images / run.seconds for run in runs]
    details: dict[str, Any] = {
        "rates": rates,
        "cores": cores,
        **{key: statistics.median(run.extra[key] for run in runs) for key in runs[0].extra},
    }
    if how := trainer.runner.describe():
        details["how"] = how
    return statistics.median(rates), details


def _report_rate(
    report: Reporter, name: str, task: CheckTask, config: Config, **options: Any
) -> tuple[float, dict[str, Any]]:
    """Measure and report; the trainer is gone afterwards."""
    in_memory = options.pop("in_memory", False)
    rate, details = _rate(_trainer(task, config, **options), task, in_memory=in_memory)
    report.figure(name, rate, "img/s", **details)
    return rate, details


def measure_step(task: CheckTask, report: Reporter) -> None:
    """The step on one batch in memory, as configured and with techniques switched off."""
    variants: dict[str, tuple[dict[str, Any], bool]] = {
        "as configured": ({}, False),
        "graph off": ({"graph": "off"}, False),
        "plain norms": ({}, True),
        "plain norms, graph off": ({"graph": "off"}, True),
    }
    for name, (changes, plain) in variants.items():
        with report.attempt(name):
            _report_rate(report, name, task, _train(task, **changes), plain_norms=plain, in_memory=True)


def measure_compiled(task: CheckTask, report: Reporter) -> None:
    """The step under torch.compile; compiling is in the seconds, not in the rate."""
    with report.attempt("compiled"):
        begin = time.perf_counter()
        trainer = _trainer(task, _train(task, compile=True))
        trainer.train_step()
        report.figure("seconds to the first step", time.perf_counter() - begin, "s")
        rate, details = _rate(trainer, task, in_memory=True)
        report.figure("compiled", rate, "img/s", **details)


def measure_tars(task: CheckTask, report: Reporter) -> None:
    """Training from tars: its rate, the share of time without data, the host's cores."""
    with report.attempt("from tars"):
        _, details = _report_rate(report, "from tars", task, detector_config(task.settings))
        report.figure("data wait share", details["data_wait_share"], "")
        report.figure("cores", details["cores"], "cores")


def measure_ghosts(task: CheckTask, report: Reporter) -> None:
    """Ghost batches of an eighth of a pass, and four passes a step, beside one batch of one pass."""
    with report.attempt("ghost batches"):
        plain, _ = _report_rate(report, "plain", task, detector_config(task.settings))
        batch = detector_config(task.settings).train.micro_batch
        # A CPU's passes hold one ghost batch unless told otherwise.
        size = "auto" if task.settings.device == "cuda" else batch
        config = _train(task, global_batch=4 * batch, micro_batch=batch // 8, pass_images=size)
        ghosts, _ = _report_rate(report, "ghost batches", task, config)
        report.figure("share of plain", ghosts / plain, "")


def measure_augmented(task: CheckTask, report: Reporter) -> None:
    """Training from tars with every image degraded, beside training without."""
    with report.attempt("degraded"):
        config = detector_config(task.settings)
        plain, _ = _report_rate(report, "plain", task, config)
        changed = replace(config, data=replace(config.data, augment=DEGRADATIONS))
        degraded, _ = _report_rate(report, "degraded", task, changed)
        report.figure("share of plain", degraded / plain, "")


def measure_checkpoint(task: CheckTask, report: Reporter) -> None:
    """How long a save in the background stops training, and when its file is safe."""
    with report.attempt("stall"), tempfile.TemporaryDirectory(dir=task.settings.folder) as folder:
        trainer = _trainer(task, detector_config(task.settings))
        run = measure_saves(trainer, task.settings, Path(folder), background=True)
        report.figure("stall", run.extra["stall_ms"], "ms", saves=run.images, **run.extra)
