"""The batches of a run: training order, damaged samples, and where the pixels come from."""

from collections.abc import Iterator
from contextlib import suppress

import torch

from dataio.loading.ahead import Ahead
from dataio.loading.in_memory import InMemoryLoader, InMemorySplit, preload
from dataio.loading.loader import Batch, Loader
from dataio.loading.open_loader import open_loader
from dataio.loading.training_order import BatchSpec, TrainingOrder, training_specs
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config
from engines.runtime.distributed import World
from engines.runtime.precision import resolve_precision
from engines.train.open_data import open_quarantine
from engines.train.pass_step import HeldBatch
from engines.train.validation_batches import ValidationBatches

STEM_IMAGES = 2048
"""Images whose patches `model.whiten` takes, rounded up to whole steps."""


class RunData:
    """Opens the loaders of a run's splits.

    Args:
        config: the run's. world: the processes. train_set, val_set: opened shards.

    Attributes:
        order: which samples a step takes. train_in_memory, val_in_memory: the decoded splits where
            `data.resident` is set. val_quarantine: of the validation split, see `open_quarantine`.
        val_batches: of the validation split, for all validations of the run.

    Raises:
        UserError: an epoch smaller than a batch; a damaged image while a split is decoded into memory.
    """

    def __init__(self, config: Config, world: World, train_set: ShardSet, val_set: ShardSet | None) -> None:
        self._config, self._world, self._train_set = config, world, train_set
        self._half = resolve_precision(config.train.precision, world.device) != "fp32"
        self.order = TrainingOrder(train_set, config.data, config.run.seed, config.train.global_batch)
        self._train_quarantine = open_quarantine(config, train_set)
        self.val_quarantine = open_quarantine(config, val_set)
        self.train_in_memory: InMemorySplit | None = None
        self.val_in_memory: InMemorySplit | None = None
        if config.data.resident:
            self.train_in_memory, self.val_in_memory = preload(
                config.data,
                world.device,
                train_set,
                val_set,
                train_quarantine=self._train_quarantine,
                val_quarantine=self.val_quarantine,
            )
        self.val_batches = (
            ValidationBatches(
                val_set, config, world, quarantine=self.val_quarantine, in_memory=self.val_in_memory
            )
            if val_set is not None
            else None
        )

    def training_specs(self, first_step: int, last_step: int, micro_batches: int = 1) -> Iterator[BatchSpec]:
        """Passes of this rank in the steps first_step..last_step-1, of at most so many micro-batches, in order."""
        return training_specs(
            self.order,
            micro_batch=self._config.train.micro_batch,
            rank=self._world.rank,
            world=self._world.size,
            first_step=first_step,
            last_step=last_step,
            micro_batches=micro_batches,
            announce=self.train_in_memory is None,
        )

    def training_batches(self, first_step: int, last_step: int, micro_batches: int = 1) -> Iterator[Batch]:
        """The images of `training_specs`."""
        specs = self.training_specs(first_step, last_step, micro_batches)
        return self._load(specs, micro_batches * self._config.train.micro_batch, half=self._half)

    def first_batch(self, step: int, size: int) -> Batch:
        """The first images of a step, as the network will see them (before mixing)."""
        return next(self._load(iter([self.order.work(step, 0, size)]), size))

    def first_images(self) -> torch.Tensor:
        """The run's first images, cropped as in training: float [N, 3, size, size], the same on every rank."""
        batch = self._config.train.micro_batch
        steps = min(self.order.steps_per_epoch, -(-STEM_IMAGES // self._config.train.global_batch))
        specs = training_specs(self.order, micro_batch=batch, rank=0, world=1, first_step=0, last_step=steps)
        return torch.cat([loaded.image.cpu() for loaded in self._load(specs, batch)])

    def gatherer(self) -> InMemoryLoader | None:
        """What cuts a batch of a held split out of its columns, see `held_batches`; None where nothing can."""
        if self.train_in_memory is None:
            return None
        loader = self._load(iter(()), 1, half=self._half)
        assert isinstance(loader, InMemoryLoader)
        return None if loader.resampled else loader

    def held_batches(self, first_step: int, last_step: int, micro_batches: int) -> Iterator[HeldBatch]:
        """The passes of `training_specs` as columns for `gatherer`; a thread is a few passes ahead."""

        def made() -> Iterator[HeldBatch]:
            specs = self.training_specs(first_step, last_step, micro_batches)
            loader = self._load(specs, micro_batches * self._config.train.micro_batch)
            assert isinstance(loader, InMemoryLoader)
            with suppress(StopIteration):
                while True:
                    yield HeldBatch(loader.next_columns())

        return Ahead(made, self._config.data.prefetch, "telltale-columns")

    def _load(self, specs: Iterator[BatchSpec], batch: int, *, half: bool = False) -> Loader | InMemoryLoader:
        return open_loader(
            self._train_set,
            self._config.data,
            specs,
            batch=batch,
            device=self._world.device,
            train=True,
            half=half,
            quarantine=self._train_quarantine,
            in_memory=self.train_in_memory,
        )
