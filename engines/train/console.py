"""What a training run prints: its start, a line per log, a line per validation."""

from pathlib import Path
from typing import Any

from dataio.core.log import log
from dataio.layouts.labels import names_photographs
from engines.runtime.distributed import World
from engines.train.optim import rate_scale
from engines.train.trainer import Trainer


def say(world: World, text: str) -> None:
    """Log `text` on rank 0."""
    if world.is_main:
        log.info(text)


def start_lines(trainer: Trainer, resumed_from: int | None) -> list[str]:
    """Model, data, steps and processes of a run that begins, or continues after a step."""
    config, schedule, world = trainer.config, trainer.schedule, trainer.world
    val_images = len(trainer.val_set) if trainer.val_set else 0
    lines = [
        f"{Path(config.run.dir)}: {config.model.backbone}, {len(trainer.train_set)} training and {val_images} "
        f"validation images, {schedule.total_steps} steps of {config.train.global_batch} "
        f"({schedule.steps_per_epoch} per epoch, the last {trainer.order.dropped} images of each epoch dropped), "
        f"{world.size} x {world.device.type}, {trainer.precision}"
    ]
    if config.optim.lr_batch:
        rate = config.optim.lr * rate_scale(config.optim, config.train.global_batch)
        lines.append(
            f"learning rate {rate:g}: optim.lr {config.optim.lr:g} is for {config.optim.lr_batch} images, a step "
            f"has {config.train.global_batch}"
        )
    if passes := trainer.runner.describe():
        lines.append(passes)
    if trainer.weight_report is not None:
        lines.append(f"{config.model.weights}: {trainer.weight_report}; all names are in weights.txt")
    splits = [s for s in (trainer.data.train_in_memory, trainer.data.val_in_memory) if s is not None]
    if splits:
        mebibytes = sum(split.pixels.nbytes for split in splits) / 2**20
        seconds = sum(split.seconds for split in splits)
        lines.append(
            f"data.resident: {mebibytes:.0f} MiB on {world.device} in each process, decoded in {seconds:.1f} s"
        )
    if not trainer.val_set:
        lines.append("no validation images: best.pt will be the last step's weights")
    if resumed_from is not None:
        lines.append(f"continuing after step {resumed_from}")
    return lines


def start_warnings(trainer: Trainer) -> list[str]:
    """What the figures of a run will lack, and generators whose names say that they are photographs."""
    splits = [("training", trainer.train_set), ("validation", trainer.val_set)]
    spelled = [name for name in trainer.train_set.labels.generators[1:] if names_photographs(name)]
    named = [
        f"generator {name!r} is a word for photographs and is trained as a fake; if they are photographs, shard "
        "them again"
        for name in spelled  # of shards that an older version wrote
    ]
    return named + [
        f"no {shards.missing_class} among the {name} images: there is no real/fake error for them"
        for name, shards in splits
        if shards is not None and shards.missing_class
    ]


def training_line(trainer: Trainer, metrics: dict[str, Any], perf: dict[str, float]) -> str:
    """Metrics and speed since the last log."""
    norm = metrics["grad_norm"]
    mfu = f", MFU {perf['mfu']:.1%}" if "mfu" in perf else ""
    return (
        f"step {trainer.step}/{trainer.schedule.total_steps} epoch {trainer.epoch:.2f} loss {metrics['loss']:.4f} "
        f"{_errors(metrics)} lr {metrics['lr']:.4g} norm {'not finite' if norm is None else f'{norm:.3g}'} | "
        f"{perf['images_per_second']:.0f} img/s, wait {perf['data_wait_share']:.1%}, "
        f"{perf['memory_gib']:.1f} GiB{mfu}"
    )


def validation_line(step: int, metrics: dict[str, Any], *, is_best: bool) -> str:
    """Loss and errors of a validation."""
    mark = " (best)" if is_best else ""
    return f"step {step} validation loss {metrics['loss']:.4f} {_errors(metrics)}{mark}"


def _errors(metrics: dict[str, Any]) -> str:
    names = (("generator", "gen"), ("real_fake", "real/fake"), ("object", "object"))
    parts = [
        f"{short} {metrics[f'{name}_error']:.2%}"
        for name, short in names
        if metrics[f"{name}_error"] is not None
    ]
    return "errors " + ", ".join(parts)
