"""From sample ids to tensors on the device, through NVIDIA DALI.

One pipeline definition serves the CPU and the GPU: encoded bytes, crop boxes and flips
are computed here (see `dataio.loading.order`) and handed to DALI by `external_source`; DALI
decodes only the box (on the GPU's JPEG engines where there is one), resizes, flips and
normalises. Because everything random comes in as data, DALI itself holds no state.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.images.headers import header_fault
from dataio.loading.augment import WEBP, draw_knobs, through_webp
from dataio.loading.balanced_order import BalancedOrder
from dataio.loading.config import DataConfig
from dataio.loading.dali_pipeline import as_images, build_pipeline, pipeline_inputs, run_pipeline
from dataio.loading.order import EpochOrder, centre_boxes, train_boxes
from dataio.loading.quarantine import Quarantine
from dataio.loading.trace import named
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import DamagedSample

_UNDECODABLE = "not a decodable image, though it was when written"


@dataclass(slots=True)
class Work:
    """What one batch is made of, before anything is read.

    ids int64 [N]; boxes int32 [N, 4] (y, x, height, width); flips int32 [N]; knobs float32
    [N, K], see `dataio.loading.augment`, None without augmentation. `again` gives the same places'
    work for other ids; None where every id has only its own place (evaluation).
    """

    ids: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.int32]
    knobs: NDArray[np.float32] | None = None
    again: Callable[[NDArray[np.int64]], "Work"] | None = None


@dataclass(slots=True)
class Batch:
    """One batch on the device.

    image float32 [N, 3, size, size], channels-last in memory, normalised; generator and
    object int64 [N], object -1 where unknown; sample_id int64 [N] on the CPU.
    """

    image: torch.Tensor
    generator: torch.Tensor
    object: torch.Tensor
    sample_id: torch.Tensor


class TrainingOrder:
    """Which samples each step of a run takes, over all epochs.

    The tail of an epoch that fills no global batch is dropped.

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
        self._order: EpochOrder | None = None
        self._announced: tuple[int, ...] = ()
        self._balanced = (
            BalancedOrder(shards, seed, config.window_shards, config.sampling)
            if config.sampling != "natural"
            else None
        )

    @property
    def dropped(self) -> int:
        """Samples at the end of each epoch that fill no global batch."""
        return len(self.shards) - self.steps_per_epoch * self.global_batch

    def step_ids(self, step: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Sample ids start..stop-1 of a step's global batch, int64; steps count from 0, all without a range."""
        stop = self.global_batch if stop is None else stop
        if self._balanced is not None:
            return self._balanced.ids(step * self.global_batch + start, step * self.global_batch + stop)
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self.shards.shard_sizes, self.seed, epoch, self.config.window_shards)
        return self._order.ids(within * self.global_batch + start, within * self.global_batch + stop)

    def announce(self, step: int, start: int, stop: int) -> None:
        """Tell the shards' cache, if there is one, what this process reads from this step on.

        It is the windows of its part of the step's global batch, start..stop-1, and the next one.
        """
        cache = self.shards.tars.cache
        if cache is None or self._balanced is not None:
            return
        epoch, within = divmod(step, self.steps_per_epoch)
        self.step_ids(step, start, start)
        order = self._order
        assert order is not None
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
            order_then = EpochOrder(self.shards.shard_sizes, self.seed, epoch + 1, self.config.window_shards)
            ahead = order_then.window(order_then.window_at(start))
        own = [order.window(number) for number in range(window, last + 1)]
        cache.plan(np.concatenate([*own, ahead]).tolist())

    def work(self, step: int, start: int, stop: int) -> Work:
        """The part start..stop-1 of a step's global batch, with its crops."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position = within * self.global_batch + np.arange(start, stop, dtype=np.int64)
        return self._drawn(epoch, position, self.step_ids(step, start, stop))

    def _drawn(self, epoch: int, position: NDArray[np.int64], ids: NDArray[np.int64]) -> Work:
        """What the positions of an epoch do to these samples."""
        width, height = self.shards.sizes(ids)
        c = self.config
        knobs = draw_knobs(c.augment, c.size, self.seed, epoch, position) if c.augment.active else None
        again = partial(self._drawn, epoch, position)
        if c.crop == "centre":
            return Work(ids, *centre_boxes(c.eval_crop, width, height), knobs, again)
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
        return Work(ids, *boxes, knobs, again)

    def known_objects(self, step: int) -> int:
        """How many samples of the step's global batch have a known object.

        Every rank can count it for itself, so no collective is needed. Where all objects are
        known, as the manifest says, or none is, nothing is counted.
        """
        if (same := self.shards.objects_alike()) is not None:
            return self.global_batch if same else 0
        if self._balanced is not None:
            return self._known(self.step_ids(step))
        begin = step % self.steps_per_epoch * self.global_batch
        self.step_ids(step, 0, 0)
        assert self._order is not None
        return sum(self._known(ids) for ids in self._order.id_sets(begin, begin + self.global_batch))

    def _known(self, ids: NDArray[np.int64] | slice) -> int:
        return int(np.count_nonzero(self.shards.rows[ids]["object"] >= 0))


def training_work(
    order: TrainingOrder,
    *,
    micro_batch: int,
    rank: int,
    world: int,
    first_step: int,
    last_step: int,
    announce: bool = True,
) -> Iterator[Work]:
    """A rank's micro-batches of steps first_step..last_step-1, in order.

    Args:
        announce: tell the shards' cache what is read next; not needed where the split is in memory.
    """
    per_rank = order.global_batch // world
    for step in range(first_step, last_step):
        begin = rank * per_rank
        if announce:
            order.announce(step, begin, begin + per_rank)
        for start in range(begin, begin + per_rank, micro_batch):
            yield order.work(step, start, start + micro_batch)


def evaluation_work(
    shards: ShardSet, config: DataConfig, *, batch: int, rank: int, world: int
) -> Iterator[Work]:
    """A rank's share of every sample exactly once, in batches of at most `batch`."""
    begin, end = len(shards) * rank // world, len(shards) * (rank + 1) // world
    for start in range(begin, end, batch):
        yield _centred(shards, config, np.arange(start, min(start + batch, end), dtype=np.int64))


def _centred(shards: ShardSet, config: DataConfig, ids: NDArray[np.int64]) -> Work:
    return Work(ids, *centre_boxes(config.eval_crop, *shards.sizes(ids)))


def resamples(shards: ShardSet, config: DataConfig, train: bool) -> bool:
    """Whether any box can differ from the network's input in size."""
    low_w, high_w, low_h, high_h = shards.image_sizes()
    if train and config.crop == "random":
        return min(low_w, low_h) + 2 * config.pad < config.size
    if train and config.crop == "random_resized":
        return True
    sides = {max(1, round(config.eval_crop * min(w, h))) for w in (low_w, high_w) for h in (low_h, high_h)}
    return sides != {config.size}


def _largest(shards: ShardSet) -> tuple[int, int]:
    """(width, height) that no image of the split exceeds, pixels."""
    largest = shards.manifest["splits"][shards.split]["largest"]
    return largest["width"], largest["height"]


class Loader:
    """Iterates `Batch`es of the given work, in order; holds no randomness.

    With a quarantine, a damaged sample is added to it and another takes its place, or none in
    evaluation, whose batches are then smaller.

    Args:
        work: what to load, for instance from `training_work` or `evaluation_work`.
        batch: the most samples one batch of `work` has.
        train: whether the boxes are training crops (they may reach into the padding).
        raw: give the boxes' pixels as they are decoded, uint8, all of one size.
        quarantine: of the split; None: a damaged sample is an error.

    Raises:
        UserError: an image cannot be read or decoded; the message names its shard and key.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        work: Iterator[Work],
        *,
        batch: int,
        device: torch.device,
        train: bool,
        raw: bool = False,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.shards, self.device, self._quarantine = shards, device, quarantine
        self._work, self._augment = work, config.augment
        # What was wanted, and what is loaded instead where samples are damaged.
        self._in_flight: deque[tuple[Work, Work]] = deque()
        self._build = partial(
            build_pipeline,
            config=config,
            device=device,
            resample=not raw and resamples(shards, config, train),
            pad=train and config.pad > 0,
            augmented=train and config.augment.in_pipeline,
            largest=_largest(shards),
            raw=raw,
        )
        self._batch = batch
        self._pipeline = self._build(self._feed(), batch=batch)

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        while True:
            with named("augment"):
                wanted = next(self._work, None)
            if wanted is None:
                return
            with named("read"):
                work, encoded = self._readable(wanted)
            if encoded:
                self._in_flight.append((wanted, work))
                yield self._inputs(work, encoded)

    def _readable(self, wanted: Work) -> tuple[Work, list[NDArray[np.uint8]]]:
        """The work without damaged samples, and its images' bytes."""
        quarantine = self._quarantine
        if quarantine is None:
            return wanted, self._read(wanted.ids)
        if quarantine.ids.isdisjoint(wanted.ids.tolist()):
            with suppress(DamagedSample):  # found again below, one by one
                return wanted, self._read(wanted.ids)
        found = [self._obtain(int(i), wanted.again is not None) for i in wanted.ids]
        ids = np.array([sample_id for sample_id, data in found if data is not None], np.int64)
        encoded = [data for _, data in found if data is not None]
        if np.array_equal(ids, wanted.ids):
            return wanted, encoded
        if wanted.again is not None:
            return wanted.again(ids), encoded
        kept = np.isin(wanted.ids, ids)
        return Work(ids, wanted.boxes[kept], wanted.flips[kept]), encoded

    def _read(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images' bytes, whose headers DALI can read."""
        found = self.shards.read_many(ids)
        for place, data in enumerate(found):
            fault = header_fault(data.data)
            if fault:
                raise self.shards.damaged(int(ids[place]), f"{_UNDECODABLE} ({fault})")
        return found

    def _obtain(self, sample_id: int, replaceable: bool) -> tuple[int, NDArray[np.uint8] | None]:
        """A sample's bytes, or those of the one that takes its place."""
        quarantine = self._quarantine
        assert quarantine is not None
        for candidate in quarantine.candidates(sample_id):
            if candidate != sample_id and not replaceable:
                break
            try:
                return candidate, self._read(np.array([candidate]))[0]
            except DamagedSample as error:
                quarantine.add(candidate, error)
        return sample_id, None

    def _inputs(self, work: Work, encoded: list[NDArray[np.uint8]]) -> tuple[Any, ...]:
        inputs = pipeline_inputs(encoded, work.boxes, work.flips)
        if work.knobs is not None:
            with named("augment"):
                for number in np.flatnonzero(work.knobs[:, WEBP]):
                    encoded[number] = through_webp(encoded[number], work.knobs[number, WEBP])
        return (*inputs, work.knobs) if self._augment.in_pipeline and work.knobs is not None else inputs

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        images = self._images()
        _, work = self._in_flight.popleft()
        rows = self.shards.rows[work.ids]
        image = as_images(images)
        labels = torch.from_numpy(np.stack([rows["generator"], rows["object"]]).astype(np.int64))
        labels = labels.to(self.device, non_blocking=True)
        return Batch(image, labels[0], labels[1], torch.from_numpy(work.ids))

    def _run(self, pipeline: Any) -> Any:
        with named("decode"):
            return run_pipeline(pipeline, self.device)

    def _images(self) -> Any:
        while True:
            try:
                return self._run(self._pipeline)
            except StopIteration:
                raise
            except RuntimeError as error:
                culprits = self._undecodable()
                if not culprits:
                    raise
                for sample_id in culprits:
                    damaged = self.shards.damaged(sample_id, _UNDECODABLE)
                    if self._quarantine is None:
                        raise damaged from error
                    self._quarantine.add(sample_id, damaged)
                # A pipeline that failed stays dead: another one starts at the batch it owed.
                again = [wanted for wanted, _ in self._in_flight]
                self._in_flight.clear()
                self._work = chain(again, self._work)
                self._pipeline = self._build(self._feed(), batch=self._batch)

    def _undecodable(self) -> list[int]:
        """The samples in flight that kill a pipeline, in order.

        DALI does not say which one did. Each is given to a pipeline of its own, not to
        another decoder: that would make what is left out depend on what else was in flight.
        """
        found: list[int] = []
        for _, work in self._in_flight:
            for place, sample_id in enumerate(work.ids.tolist()):
                one = slice(place, place + 1)
                knobs = None if work.knobs is None else work.knobs[one]
                try:
                    part = Work(work.ids[one], work.boxes[one], work.flips[one], knobs)
                    inputs = self._inputs(part, [self.shards.read(sample_id)])
                    self._run(self._build(iter([inputs]), batch=1))
                except DamagedSample:
                    continue  # damaged since it was fed: found when it is fed again
                except (RuntimeError, OSError):
                    found.append(sample_id)
        if len(found) == sum(len(work.ids) for _, work in self._in_flight) > 1:
            return []  # every single one: it is the machine (memory, a driver), not an image
        return list(dict.fromkeys(found))
