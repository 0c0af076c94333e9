"""From sample ids to tensors on the device, through NVIDIA DALI.

One pipeline definition serves the CPU and the GPU: encoded bytes, crop boxes and flips
are computed here (see `dataio.loading.training_order`) and handed to DALI by `external_source`; DALI
decodes only the box (on the GPU's JPEG engines where there is one), resizes, flips and
normalizes. Because everything random comes in as data, DALI itself holds no state.

All of it happens in a thread of the loader (`dataio.loading.batch_source`), a few batches ahead; taking
a batch is taking it from a queue.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from dataio.core.log import log
from dataio.loading.ahead import Ahead
from dataio.loading.batch_source import BatchSource
from dataio.loading.config import DataConfig
from dataio.loading.dali_pipeline import build_pipeline
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import BatchSpec
from dataio.shards.shard_set import ShardSet


@dataclass(slots=True)
class Batch:
    """One batch on the device.

    image float32 (float16 from a loader with `half` on a GPU) [N, 3, size, size], channels-last in
    memory, normalized; generator and object_label int64 [N], object_label -1 where unknown;
    sample_id int64 [N] on the CPU.
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

    A thread prepares `config.prefetch` batches ahead. It starts with the first batch that is asked for and
    ends with the last, with `close`, or when the loader is forgotten. An error or warning comes with the
    batch that it belongs to, in the thread that takes the batches. On a GPU they are taken in
    PyTorch's current stream, and nothing waits for the device.

    With a quarantine, a damaged sample is added to it and another takes its place, or none in
    evaluation, whose batches are then smaller.

    Args:
        work: what to load, for instance from `training_specs` or `evaluation_specs`.
        batch: the most samples one batch of `work` has.
        train: whether the boxes are training crops (they may reach into the padding).
        raw: give the boxes' pixels as they are decoded, uint8, all of one size.
        whole_images: decode more than the boxes, as padding needs; the batches are the same.
        half: on a GPU, give float16 images; rounded last of all.
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
        half: bool = False,
        quarantine: Quarantine | None = None,
    ) -> None:
        if str(device) == "cuda":  # without a number
            device = torch.device("cuda", torch.cuda.current_device())  # of this thread
        self.shards, self.device = shards, device
        build = partial(
            build_pipeline,
            config=config,
            device=device,
            resample=not raw and resamples(shards, config, train),
            pad=whole_images or (train and config.pad > 0),
            augmented=train and config.augment.in_pipeline,
            largest=_largest(shards),
            raw=raw,
            half=half and device.type == "cuda",
        )
        source = partial(
            BatchSource,
            shards,
            work,
            build,
            batch=batch,
            device=device,
            with_params=config.augment.in_pipeline,
            quarantine=quarantine,
        )
        # Before the thread starts, so that DALI is shut down after the thread when the process ends.
        import nvidia.dali.pipeline  # noqa: F401

        self._ahead = Ahead(source, config.prefetch, "telltale-loader")

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        while True:
            loaded = self._ahead.take(self._passed())
            for note in loaded.notes:
                log.warning(note)
            if loaded.image is not None:
                break
        if loaded.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(loaded.ready)
            # Their memory belongs to the thread's stream, which must not use it again too early.
            loaded.image.record_stream(stream)
            loaded.labels.record_stream(stream)
        return Batch(loaded.image, loaded.labels[0], loaded.labels[1], torch.from_numpy(loaded.sample_id))

    def _passed(self) -> Callable[[], object] | None:
        """Waits, in the loader's thread, until the device has done what was queued so far.

        So the host is a few batches ahead of the device at most, and so is the memory of their images.
        """
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def close(self) -> None:
        """End the loader's thread, and wait for that; there are no more batches."""
        self._ahead.close()
