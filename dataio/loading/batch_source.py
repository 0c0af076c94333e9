"""What a loader's thread does: the order, the reads, the checks, DALI and what goes to the device.

Everything here runs in one thread, which is not the one that trains.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataio.images.headers import header_faults
from dataio.loading.augment import WEBP, through_webp
from dataio.loading.dali_pipeline import as_images, pipeline_inputs, run_pipeline
from dataio.loading.quarantine import Quarantine
from dataio.loading.trace import record_range
from dataio.loading.training_order import BatchSpec
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import DamagedSample

_UNDECODABLE = "not a decodable image, though it was when written"


@dataclass(slots=True)
class LoadedBatch:
    """What the thread hands over.

    Attributes:
        image: as in `Batch`; None where only `notes` are left.
        labels: int64 [2, N] on the device, generators and objects. sample_id: int64 [N].
        notes: warnings about damaged samples, to be given with this batch.
        ready: on a GPU: recorded behind what wrote `image` and `labels`.
    """

    image: torch.Tensor | None
    labels: torch.Tensor
    sample_id: NDArray[np.int64]
    notes: list[str]
    ready: torch.cuda.Event | None = None


@dataclass(slots=True)
class _Planned:
    """A batch that was asked for; without `spec`, what is to be said or raised in its place."""

    spec: BatchSpec | None
    notes: list[str] = field(default_factory=list)
    failure: Exception | None = None


@dataclass(slots=True)
class _Fed:
    """A batch in the pipeline: what was asked for, and what is loaded instead where samples are damaged."""

    planned: _Planned
    work: BatchSpec


@cache
def _loading_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders: PyTorch has 32 of a kind and would hand out one that is being captured, too.

    Of high priority, so that a batch's copy does not wait behind a step's kernels.
    """
    return torch.cuda.Stream(device, priority=-1)


class BatchSource:
    """Iterates `LoadedBatch`es; see `dataio.loading.loader.Loader` for the arguments.

    An error is raised in the place of the batch that it belongs to, when all before it were given.

    Args:
        build: makes the pipeline, of (source, batch=).
        with_params: the pipeline takes augmentation parameters.
    """

    def __init__(
        self,
        shards: ShardSet,
        work: Iterator[BatchSpec],
        build: Callable[..., Any],
        *,
        batch: int,
        device: torch.device,
        with_params: bool,
        quarantine: Quarantine | None,
    ) -> None:
        self._shards, self._device, self._quarantine = shards, device, quarantine
        self._planned = map(_Planned, work)
        self._build, self._batch, self._with_params = build, batch, with_params
        self._again: deque[_Planned] = deque()  # comes before `_planned`
        self._in_flight: deque[_Fed] = deque()
        self._rest = _Planned(None)  # what comes after the batches in flight
        self._pipeline: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __iter__(self) -> "BatchSource":
        return self

    def __next__(self) -> LoadedBatch:
        if self._device.type == "cuda" and self._stream is None:
            torch.cuda.set_device(self._device)  # of this thread
            self._stream = _loading_stream(self._device)
        images = self._images()
        if images is not None:
            return self._loaded(images, self._in_flight.popleft())
        rest, self._rest = self._rest, _Planned(None, [], self._rest.failure)
        if rest.notes:
            return LoadedBatch(None, torch.empty(0), np.zeros(0, np.int64), rest.notes)
        if rest.failure is not None:
            raise rest.failure
        raise StopIteration

    def close(self) -> None:
        """Free the pipeline, in the thread that runs it."""
        self._pipeline = None

    def _loaded(self, images: Any, fed: _Fed) -> LoadedBatch:
        rows = self._shards.rows[fed.work.ids]
        labels = torch.from_numpy(np.stack([rows["generator"], rows["object"]]).astype(np.int64))
        if self._stream is None:
            return LoadedBatch(as_images(images), labels, fed.work.ids, fed.planned.notes)
        with torch.cuda.stream(self._stream):
            # A copy: DALI would use its buffer again as soon as its own stream lets it, whatever
            # stream still reads.
            image = as_images(images).clone()
            labels = labels.pin_memory().to(self._device, non_blocking=True)
            ready = torch.cuda.Event(blocking=True)
            ready.record(self._stream)
        # This thread may wait: what it hands over is there, and DALI's inputs are no longer needed.
        ready.synchronize()
        return LoadedBatch(image, labels, fed.work.ids, fed.planned.notes, ready)

    # ---- feeding the pipeline -----------------------------------------------------------

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        """The pipeline's inputs; ends early, with `_rest`, at the first error."""
        while True:
            planned = _Planned(None)
            try:
                with record_range("augment"):
                    following = self._again.popleft() if self._again else next(self._planned, None)
                if following is None:
                    return
                planned = following
                if planned.failure is not None:
                    raise planned.failure
                if planned.spec is None:
                    self._rest.notes += planned.notes
                    continue
                with record_range("read"):
                    work, encoded = self._readable(planned.spec, planned.notes)
                if not encoded:
                    self._rest.notes += planned.notes
                    continue
                inputs = self._inputs(work, encoded)
            except Exception as error:
                self._rest = _Planned(None, self._rest.notes + planned.notes, error)
                return
            planned.notes[:0] = self._rest.notes
            self._rest = _Planned(None)
            self._in_flight.append(_Fed(planned, work))
            yield inputs

    def _readable(self, spec: BatchSpec, notes: list[str]) -> tuple[BatchSpec, list[NDArray[np.uint8]]]:
        """The work without damaged samples, and its images' bytes."""
        quarantine = self._quarantine
        if quarantine is None:
            return spec, self._read(spec.ids)
        if quarantine.ids.isdisjoint(spec.ids.tolist()):
            with suppress(DamagedSample):  # read again below, one by one
                return spec, self._read(spec.ids)
        obtained = [self._obtain(int(i), spec.with_ids is not None, notes) for i in spec.ids]
        ids = np.array([sample_id for sample_id, data in obtained if data is not None], np.int64)
        encoded = [data for _, data in obtained if data is not None]
        if np.array_equal(ids, spec.ids):
            return spec, encoded
        if spec.with_ids is not None:
            return spec.with_ids(ids), encoded
        kept = np.isin(spec.ids, ids)
        return BatchSpec(ids, spec.boxes[kept], spec.flips[kept]), encoded

    def _read(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images' bytes, whose headers DALI can read."""
        encoded = self._shards.read_many(ids)
        for place, fault in header_faults(encoded):
            raise self._shards.damaged(int(ids[place]), f"{_UNDECODABLE} ({fault})")
        return encoded

    def _obtain(
        self, sample_id: int, replaceable: bool, notes: list[str]
    ) -> tuple[int, NDArray[np.uint8] | None]:
        """A sample's bytes, or those of the one that takes its place."""
        quarantine = self._quarantine
        assert quarantine is not None
        for candidate in quarantine.candidates(sample_id):
            if candidate != sample_id and not replaceable:
                break
            try:
                return candidate, self._read(np.array([candidate]))[0]
            except DamagedSample as error:
                quarantine.add(candidate, error, notes.append)
        return sample_id, None

    def _inputs(self, work: BatchSpec, encoded: list[NDArray[np.uint8]]) -> tuple[Any, ...]:
        inputs = pipeline_inputs(encoded, work.boxes, work.flips)
        if work.params is not None:
            with record_range("augment"):
                for number in np.flatnonzero(work.params[:, WEBP]):
                    encoded[number] = through_webp(encoded[number], work.params[number, WEBP])
        return (*inputs, work.params) if self._with_params and work.params is not None else inputs

    # ---- running it ---------------------------------------------------------------------

    def _run(self, pipeline: Any) -> Any:
        with record_range("decode"):
            return run_pipeline(pipeline, self._stream)

    def _images(self) -> Any:
        """The next batch of the pipeline; None after the last."""
        while True:
            try:
                if self._pipeline is None:
                    self._pipeline = self._build(self._feed(), batch=self._batch)
                return self._run(self._pipeline)
            except StopIteration:
                return None
            except RuntimeError as error:
                if not self._skip_undecodable(error):
                    raise

    def _skip_undecodable(self, error: RuntimeError) -> bool:
        """After DALI's error, let the batches in flight start again without what it cannot decode.

        Returns:
            whether any sample was to blame.
        """
        culprits = self._undecodable()
        again = [fed.planned for fed in self._in_flight]
        if self._rest.notes or self._rest.failure is not None:
            again.append(self._rest)
        for sample_id, place in culprits.items():
            damaged = self._shards.damaged(sample_id, _UNDECODABLE)
            try:
                if self._quarantine is None:
                    raise damaged from error
                self._quarantine.add(sample_id, damaged, again[place].notes.append)
            except Exception as failure:
                again[place:] = [_Planned(None, again[place].notes, failure)]
                break
        # A failed pipeline cannot go on: a new one starts with the batches in flight.
        self._in_flight.clear()
        self._rest, self._pipeline = _Planned(None), None
        self._again.extendleft(reversed(again))
        return bool(culprits)

    def _undecodable(self) -> dict[int, int]:
        """The samples in flight that make a pipeline fail, in order, and the place of their batch.

        DALI does not name them. Each gets a pipeline of its own, not another decoder: which samples
        are skipped must not depend on which others were in flight.
        """
        failing: dict[int, int] = {}
        failures = 0
        for batch, fed in enumerate(self._in_flight):
            for place, sample_id in enumerate(fed.work.ids.tolist()):
                row = slice(place, place + 1)
                params = None if fed.work.params is None else fed.work.params[row]
                try:
                    part = BatchSpec(fed.work.ids[row], fed.work.boxes[row], fed.work.flips[row], params)
                    inputs = self._inputs(part, [self._shards.read(sample_id)])
                    self._run(self._build(iter([inputs]), batch=1))
                except DamagedSample:
                    continue  # damaged since it was fed: found when it is fed again
                except (RuntimeError, OSError):
                    failures += 1
                    failing.setdefault(sample_id, batch)
        if failures == sum(len(fed.work.ids) for fed in self._in_flight) > 1:
            return {}  # all of them: the machine fails (memory, a driver), not an image
        return failing
