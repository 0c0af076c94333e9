"""Trainers of a tiny configuration on any device, with the same pixels for each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dataio.images.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.loading.loader import Batch
from dataio.sharding.job import write_shards
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.runtime.paths import CONFIGS
from engines.train.trainer import Trainer
from tests.support import flags

# Training in which rounding does not grow: small steps, fp32 without TF32, and a batch norm over 16 images.
STEADY = {
    "train__steps": 8,
    "train__precision": "fp32",
    "train__tf32": False,
    "train__micro_batch": 16,
    "train__pass_images": 16,
    "optim__lr": 1e-4,
    "loss__object": 0.1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema and mixing": {"train__ema": 0.9, "mix__mixup": 0.4, "mix__cutmix": 1.0},
    "weighted classes": {"loss__class_weights": "inverse", "loss__label_smoothing": 0.1},
    "frozen first": {"train__frozen_epochs": 0.1, "optim__name": "adamw", "optim__lr": 1e-5},
}


def device_world(device: str) -> World:
    """One process on a device."""
    return World(rank=0, size=1, local_rank=0, device=torch.device(device), distributed=False)


def build_trainer(shards: Path, device: str, **changes: Any) -> Trainer:
    """A trainer of the tests' tiny configuration with changes (dots written as double underscores)."""
    config = parse_config(flags(data__shards=shards, **changes), CONFIGS / "quickstart.yaml")
    return Trainer(config, device_world(device), ShardSet(shards, "train"), ShardSet(shards, "val"))


def train_losses(trainer: Trainer, steps: int) -> list[float]:
    """The losses of so many steps."""
    found = []
    for _ in range(steps):
        trainer.train_step()
        found.append(trainer.pop_metrics()["loss"])
    return found


def share_pixels(trainers: Sequence[Trainer], steps: int) -> None:
    """Let trainers of equal passes train on the same images for the next steps: the first one's loader decodes them.

    Two decoders differ by more than rounding, and so may two runs of one that shares the work by load.
    """
    source = trainers[0]
    source.prepare()
    passes = source.data.training_batches(source.step, source.step + steps, source.runner.micro_batches)
    batches = list(passes)
    for trainer in trainers:
        trainer.use_batches(_copied(batches, trainer.world.device))


def _copied(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        image, generator, object_label = (
            tensor.to(device, copy=True) for tensor in (batch.image, batch.generator, batch.object_label)
        )
        yield replace(batch, image=image, generator=generator, object_label=object_label)


def write_more_shards(folder: Path) -> Path:
    """Make and shard 640 images of 32 px in a folder: enough for a global batch of 256."""
    write_synthetic(folder / "source", images=640, size=32, seed=4)
    layout = GenImageLayout(folder / "source", val_fraction=0.1)
    write_shards(layout, folder / "shards", preset_policy("default", 32), samples_per_shard=100, quiet=True)
    return folder / "shards"
