"""From sample ids to tensors on the device, through NVIDIA DALI.

One pipeline definition serves the CPU and the GPU: encoded bytes, crop boxes and flips
are computed here (see `dataio.loading.training_order`) and handed to DALI by `external_source`; DALI
decodes only the box (on the GPU's JPEG engines where there is one), resizes, flips and
normalizes. Because everything random comes in as data, DALI itself holds no state.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataio.images.headers import header_fault
from dataio.loading.augment import WEBP, through_webp
from dataio.loading.config import DataConfig
from dataio.loading.dali_pipeline import as_images, build_pipeline, pipeline_inputs, run_pipeline
from dataio.loading.quarantine import Quarantine
from dataio.loading.trace import record_range
from dataio.loading.training_order import BatchSpec
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import DamagedSample

_UNDECODABLE = "not a decodable image, though it was when written"


@dataclass(slots=True)
class Batch:
    """One batch on the device.

    image float32 [N, 3, size, size], channels-last in memory, normalized; generator and
    object_label int64 [N], object_label -1 where unknown; sample_id int64 [N] on the CPU.
    """

    image: torch.Tensor
    generator: torch.Tensor
    object_label: torch.Tensor
    sample_id: torch.Tensor


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
        work: what to load, for instance from `training_specs` or `evaluation_specs`.
        batch: the most samples one batch of `work` has.
        train: whether the boxes are training crops (they may reach into the padding).
        raw: give the boxes' pixels as they are decoded, uint8, all of one size.
        whole_images: decode more than the boxes, as padding needs; the batches are the same.
        quarantine: of the split; None: a damaged sample is an error.

    Raises:
        UserError: an image cannot be read or decoded; the message names its shard and key.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        work: Iterator[BatchSpec],
        *,
        batch: int,
        device: torch.device,
        train: bool,
        raw: bool = False,
        whole_images: bool = False,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.shards, self.device, self._quarantine = shards, device, quarantine
        self._work, self._augment = work, config.augment
        # (asked for, loaded instead where samples are damaged)
        self._in_flight: deque[tuple[BatchSpec, BatchSpec]] = deque()
        self._build = partial(
            build_pipeline,
            config=config,
            device=device,
            resample=not raw and resamples(shards, config, train),
            pad=whole_images or (train and config.pad > 0),
            augmented=train and config.augment.in_pipeline,
            largest=_largest(shards),
            raw=raw,
        )
        self._batch = batch
        self._pipeline = self._build(self._feed(), batch=batch)

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        while True:
            with record_range("augment"):
                planned = next(self._work, None)
            if planned is None:
                return
            with record_range("read"):
                work, encoded = self._readable(planned)
            if encoded:
                self._in_flight.append((planned, work))
                yield self._inputs(work, encoded)

    def _readable(self, planned: BatchSpec) -> tuple[BatchSpec, list[NDArray[np.uint8]]]:
        """The work without damaged samples, and its images' bytes."""
        quarantine = self._quarantine
        if quarantine is None:
            return planned, self._read(planned.ids)
        if quarantine.ids.isdisjoint(planned.ids.tolist()):
            with suppress(DamagedSample):  # read again below, one by one
                return planned, self._read(planned.ids)
        obtained = [self._obtain(int(i), planned.with_ids is not None) for i in planned.ids]
        ids = np.array([sample_id for sample_id, data in obtained if data is not None], np.int64)
        encoded = [data for _, data in obtained if data is not None]
        if np.array_equal(ids, planned.ids):
            return planned, encoded
        if planned.with_ids is not None:
            return planned.with_ids(ids), encoded
        kept = np.isin(planned.ids, ids)
        return BatchSpec(ids, planned.boxes[kept], planned.flips[kept]), encoded

    def _read(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images' bytes, whose headers DALI can read."""
        encoded = self.shards.read_many(ids)
        for place, data in enumerate(encoded):
            fault = header_fault(data.data)
            if fault:
                raise self.shards.damaged(int(ids[place]), f"{_UNDECODABLE} ({fault})")
        return encoded

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

    def _inputs(self, work: BatchSpec, encoded: list[NDArray[np.uint8]]) -> tuple[Any, ...]:
        inputs = pipeline_inputs(encoded, work.boxes, work.flips)
        if work.params is not None:
            with record_range("augment"):
                for number in np.flatnonzero(work.params[:, WEBP]):
                    encoded[number] = through_webp(encoded[number], work.params[number, WEBP])
        return (*inputs, work.params) if self._augment.in_pipeline and work.params is not None else inputs

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
        with record_range("decode"):
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
                # A failed pipeline cannot go on: a new one starts with the batches in flight.
                unfinished = [planned for planned, _ in self._in_flight]
                self._in_flight.clear()
                self._work = chain(unfinished, self._work)
                self._pipeline = self._build(self._feed(), batch=self._batch)

    def _undecodable(self) -> list[int]:
        """The samples in flight that make a pipeline fail, in order.

        DALI does not name them. Each gets a pipeline of its own, not another decoder: which samples
        are skipped must not depend on which others were in flight.
        """
        failing: list[int] = []
        for _, work in self._in_flight:
            for place, sample_id in enumerate(work.ids.tolist()):
                row = slice(place, place + 1)
                params = None if work.params is None else work.params[row]
                try:
                    part = BatchSpec(work.ids[row], work.boxes[row], work.flips[row], params)
                    inputs = self._inputs(part, [self.shards.read(sample_id)])
                    self._run(self._build(iter([inputs]), batch=1))
                except DamagedSample:
                    continue  # damaged since it was fed: found when it is fed again
                except (RuntimeError, OSError):
                    failing.append(sample_id)
        if len(failing) == sum(len(work.ids) for _, work in self._in_flight) > 1:
            return []  # all of them: the machine fails (memory, a driver), not an image
        return list(dict.fromkeys(failing))
