"""Which samples each step takes, with their crops: the plan of a batch before anything is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.loading.augment import AugmentParams, draw_augment_params
from dataio.loading.balanced_order import BalancedOrder
from dataio.loading.config import DataConfig
from dataio.loading.crops import center_boxes, train_boxes
from dataio.loading.order import EpochOrder
from dataio.shards.shard_set import ShardSet


@dataclass(slots=True)
class BatchSpec:
    """One batch before anything is read: samples, crops, flips and augmentation.

    ids int64 [N]; boxes int32 [N, 4] (y, x, height, width); flips int32 [N]; params float32
    [N, K], see `dataio.loading.augment`, None without augmentation. `with_ids` gives the
    spec of the same positions for other ids; None where an id has only its own position (evaluation).
    """

    ids: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.int32]
    params: AugmentParams | None = None
    with_ids: Callable[[NDArray[np.int64]], "BatchSpec"] | None = None


class TrainingOrder:
    """Which samples each step of a run takes, over all epochs; for any thread.

    The tail of an epoch that does not fill a global batch is dropped.

    Raises:
        UserError: an epoch holds less than one global batch.
    """

    def __init__(self, shards: ShardSet, config: DataConfig, seed: int, global_batch: int) -> None:
        self.shards, self.config, self.seed, self.global_batch = shards, config, seed, global_batch
        self.steps_per_epoch = len(shards) // global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{shards.folder}: the {shards.split} split has {len(shards)} samples, less than one "
                f"train.global_batch of {global_batch}; lower it"
            )
        # Two: a loader's thread is an epoch ahead of the step for a while.
        self._epoch_order = lru_cache(maxsize=2)(self._order_of)
        self._announced: tuple[int, ...] = ()
        self._balanced = (
            BalancedOrder(shards, seed, config.window_shards, config.sampling)
            if config.sampling != "natural"
            else None
        )

    @property
    def dropped(self) -> int:
        """Samples at the end of each epoch that do not fill a global batch."""
        return len(self.shards) - self.steps_per_epoch * self.global_batch

    def step_ids(self, step: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Sample ids start..stop-1 of a step's global batch, int64; steps count from 0, all without a range."""
        stop = self.global_batch if stop is None else stop
        if self._balanced is not None:
            return self._balanced.ids(step * self.global_batch + start, step * self.global_batch + stop)
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch).ids(
            within * self.global_batch + start, within * self.global_batch + stop
        )

    def _order_of(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.shards.shard_sizes, self.seed, epoch, self.config.window_shards)

    def announce(self, step: int, start: int, stop: int) -> None:
        """Tell the shards' cache, if there is one, what this process reads next.

        These are the windows of its part of the step's global batch, start..stop-1, and the next window.
        """
        cache = self.shards.tars.cache
        if cache is None or self._balanced is not None:
            return
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        first = within * self.global_batch + start
        window, last = order.window_at(first), order.window_at(first + stop - start - 1)
        # A large global batch spans many windows, most of which are the other processes'.
        following = max(window + 1, order.window_at(first + self.global_batch))
        ends = within + 1 == self.steps_per_epoch
        if self._announced == (epoch, window, last, following, ends):
            return
        self._announced = (epoch, window, last, following, ends)
        ahead = order.window(following)[: 0 if ends else None]
        if len(ahead) == 0:
            order_then = self._order_of(epoch + 1)
            ahead = order_then.window(order_then.window_at(start))
        current = [order.window(number) for number in range(window, last + 1)]
        cache.plan(np.concatenate([*current, ahead]).tolist())

    def shards_of(self, start: int, stop: int, epoch: int = 0) -> NDArray[np.int64]:
        """The shards that positions start..stop-1 of all steps of an epoch may lie in, int64, ascending.

        These are whole windows of `data.window_shards`; with balanced sampling all shards.
        """
        if self._balanced is not None:
            return np.arange(len(self.shards.shards), dtype=np.int64)
        order = self._epoch_order(epoch)
        begins = np.arange(self.steps_per_epoch, dtype=np.int64) * self.global_batch
        windows = order.windows_within(begins + start, begins + stop)
        return np.sort(np.concatenate([order.window(number) for number in windows.tolist()]))

    def work(self, step: int, start: int, stop: int) -> BatchSpec:
        """The part start..stop-1 of a step's global batch, with its crops."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position = within * self.global_batch + np.arange(start, stop, dtype=np.int64)
        return self._drawn(epoch, position, self.step_ids(step, start, stop))

    def _drawn(self, epoch: int, position: NDArray[np.int64], ids: NDArray[np.int64]) -> BatchSpec:
        """The crops and augmentation of the epoch's positions, applied to these samples."""
        width, height = self.shards.sizes(ids)
        c = self.config
        params = (
            draw_augment_params(c.augment, c.size, self.seed, epoch, position) if c.augment.active else None
        )
        with_ids = partial(self._drawn, epoch, position)
        if c.crop == "centre":
            return BatchSpec(ids, *center_boxes(c.eval_crop, width, height), params, with_ids)
        boxes = train_boxes(
            c.crop,
            c.size,
            c.pad,
            c.scale,
            c.ratio,
            c.flip,
            self.seed,
            epoch,
            position,
            width,
            height,
            c.crop_step,
        )
        return BatchSpec(ids, *boxes, params, with_ids)

    def known_objects(self, step: int) -> int:
        """How many samples of the step's global batch have a known object.

        Each rank counts for itself, so no collective is needed. Where the manifest says that all
        objects are known, or none, nothing is counted.
        """
        if (same := self.shards.objects_alike()) is not None:
            return self.global_batch if same else 0
        if self._balanced is not None:
            return self._known(self.step_ids(step))
        epoch, within = divmod(step, self.steps_per_epoch)
        begin = within * self.global_batch
        order = self._epoch_order(epoch)
        return sum(self._known(ids) for ids in order.id_sets(begin, begin + self.global_batch))

    def _known(self, ids: NDArray[np.int64] | slice) -> int:
        return int(np.count_nonzero(self.shards.rows[ids]["object"] >= 0))


def micro_batches_of(total: int, rank: int, world: int) -> range:
    """The micro-batches of a global batch that a rank runs, by number.

    Contiguous, and as even as can be: the counts of two ranks differ by at most one.
    """
    return range(total * rank // world, total * (rank + 1) // world)


def passes_of(share: range, micro_batches: int) -> list[range]:
    """A rank's micro-batches in passes of at most so many, in order; the last pass may hold fewer."""
    return [share[start : start + micro_batches] for start in range(0, len(share), micro_batches)]


def training_specs(
    order: TrainingOrder,
    *,
    micro_batch: int,
    rank: int,
    world: int,
    first_step: int,
    last_step: int,
    micro_batches: int = 1,
    announce: bool = True,
) -> Iterator[BatchSpec]:
    """A rank's passes of steps first_step..last_step-1, in order.

    Args:
        micro_batch: images. micro_batches: the most that a pass holds.
        announce: tell the shards' cache what is read next; not needed where the split is in memory.
    """
    share = micro_batches_of(order.global_batch // micro_batch, rank, world)
    passes = passes_of(share, micro_batches)
    for step in range(first_step, last_step):
        if announce:
            order.announce(step, share.start * micro_batch, share.stop * micro_batch)
        for held in passes:
            yield order.work(step, held.start * micro_batch, held.stop * micro_batch)


def evaluation_specs(
    shards: ShardSet, config: DataConfig, *, batch: int, rank: int, world: int
) -> Iterator[BatchSpec]:
    """A rank's share of every sample exactly once, in batches of at most `batch`."""
    begin, end = len(shards) * rank // world, len(shards) * (rank + 1) // world
    for start in range(begin, end, batch):
        yield _centered(shards, config, np.arange(start, min(start + batch, end), dtype=np.int64))


def _centered(shards: ShardSet, config: DataConfig, ids: NDArray[np.int64]) -> BatchSpec:
    return BatchSpec(ids, *center_boxes(config.eval_crop, *shards.sizes(ids)))
