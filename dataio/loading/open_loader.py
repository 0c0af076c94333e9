"""The loader for a split: out of its tars, or out of memory."""

from collections.abc import Iterator

import torch

from dataio.loading.config import DataConfig
from dataio.loading.in_memory import InMemoryLoader, InMemorySplit
from dataio.loading.loader import Loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import BatchSpec
from dataio.shards.shard_set import ShardSet


def open_loader(
    shards: ShardSet,
    config: DataConfig,
    work: Iterator[BatchSpec],
    *,
    batch: int,
    device: torch.device,
    train: bool,
    half: bool = False,
    quarantine: Quarantine | None = None,
    in_memory: InMemorySplit | None = None,
) -> Loader | InMemoryLoader:
    """Iterate `Batch`es of `work`: decoded from `shards`, or cut from `in_memory` where that is given.

    Args:
        batch, device, train, half, quarantine: see `dataio.loading.loader.Loader`.
        in_memory: the decoded images of `shards`, see `dataio.loading.in_memory.preload`.

    Raises:
        UserError: an image cannot be read or decoded, and there is no quarantine.
    """
    if in_memory is None:
        return Loader(
            shards, config, work, batch=batch, device=device, train=train, half=half, quarantine=quarantine
        )
    return InMemoryLoader(
        shards, in_memory, config, work, device=device, train=train, half=half, quarantine=quarantine
    )
