"""From sample ids to tensors on the device, through NVIDIA DALI.

One pipeline definition serves the CPU and the GPU: encoded bytes, crop boxes and flips
are computed here (see `dataio.order`) and handed to DALI by `external_source`; DALI
decodes only the box (on the GPU's JPEG engines where there is one), resizes, flips and
normalises. Because everything random comes in as data, DALI itself holds no state.
"""

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dataio.augment import WEBP, AugmentConfig, draw_knobs, through_webp
from dataio.errors import UserError
from dataio.index import ShardSet
from dataio.order import EpochOrder, centre_boxes, train_boxes
from dataio.pipeline import build_pipeline
from dataio.sampling import BalancedOrder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class SyntheticConfig:
    """A synthetic data set to be made where `data.shards` does not exist yet."""

    images: int = 0
    """How many images to draw; 0 makes none."""
    size: int = 64
    """Side of the images, pixels."""
    seed: int = 0
    """Seed of the drawing."""

    def __post_init__(self) -> None:
        if self.images < 0 or self.size < 16:
            raise ValueError("data.synthetic: images must be >= 0 and size >= 16")


@dataclass(kw_only=True)
class DataConfig:
    """Where the images are and how they become tensors."""

    shards: str = "data/quickstart"
    """Folder written by launch/shard.py."""
    subsets: list[str] = field(default_factory=list)
    """Train and validate on these parts only (GenImage's generator folders); empty means all."""
    generators: list[str] = field(default_factory=list)
    """Train and validate on photographs and these generators only; empty means all. The heads stay as they are."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What else happens to training images."""
    sampling: Literal["natural", "balanced", "square_root"] = "natural"
    """How often each generator's images are drawn: as they are, equally, or by the root of their number."""
    size: int = 224
    """Side of the network's square input, pixels."""
    crop: Literal["random", "random_resized", "centre"] = "random_resized"
    """Training crop: random (never resampled), random_resized, or centre (as in evaluation)."""
    pad: int = 0
    """With crop random: pixels of padding (of the mean colour) round the image first."""
    scale: tuple[float, float] = (0.35, 1.0)
    """With crop random_resized: range of the box's share of the area."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """With crop random_resized: range of the box's aspect ratio, width / height."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    eval_crop: float = 0.875
    """Evaluation takes the centred square of this share of the shortest side."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Then divided by."""
    window_shards: int = 16
    """How many shards are shuffled together; more mixes better, fewer reads more locally."""
    threads: int = 0
    """DALI's decoding threads per process; 0 means this process's share of the cores."""
    prefetch: int = 2
    """Batches DALI prepares ahead."""
    deterministic: bool = False
    """On a GPU: decode without the hardware engines, so that bits do not depend on load."""
    hw_decoder_load: float = 0.65
    """On a GPU: share of the images decoded by the hardware JPEG engines."""
    verify: bool = False
    """Check the SHA-256 of every shard before the first step."""
    cache_dir: str = ""
    """Folder of this machine for copies of the shards, which its processes and runs share; empty: none."""
    cache_gib: float = 0.0
    """The most that data.cache_dir may hold, GiB; the longest unused are evicted. 0: what the disk has."""
    require_audit: bool = False
    """Refuse to train where the shards' audit (launch/audit.py) is a fail, missing or of other shards."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Makes the shards on first use (the quickstart)."""

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"data.size is {self.size}, expected at least 8 pixels")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}, expected a probability in [0, 1]")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"data.eval_crop is {self.eval_crop}, expected a share in (0, 1]")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale is {list(self.scale)}, expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio is {list(self.ratio)}, expected 0 < low <= high")
        if self.pad < 0 or (self.pad and self.crop != "random"):
            raise ValueError(f"data.pad is {self.pad}, expected 0, or more with data.crop random")
        if min(self.std) <= 0:
            raise ValueError(f"data.std is {list(self.std)}, expected numbers above 0")
        if self.window_shards < 1 or self.prefetch < 1 or self.threads < 0:
            raise ValueError(
                "data.window_shards and data.prefetch must be at least 1, data.threads at least 0"
            )
        if self.cache_gib < 0:
            raise ValueError(f"data.cache_gib is {self.cache_gib}, expected 0 or more")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"data.hw_decoder_load is {self.hw_decoder_load}, expected a share in [0, 1]")


@dataclass(slots=True)
class Work:
    """What one batch is made of, before anything is read.

    ids int64 [N]; boxes int32 [N, 4] (y, x, height, width); flips int32 [N]; knobs float32
    [N, K], see `dataio.augment`, None without augmentation.
    """

    ids: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.int32]
    knobs: NDArray[np.float32] | None = None


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
        self._announced: tuple[int, int] | None = None
        self._balanced = (
            BalancedOrder(shards, seed, config.window_shards, config.sampling)
            if config.sampling != "natural"
            else None
        )

    @property
    def dropped(self) -> int:
        """Samples at the end of each epoch that fill no global batch."""
        return len(self.shards) - self.steps_per_epoch * self.global_batch

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """Sample ids of a step's global batch, int64 [global_batch]; steps count from 0."""
        if self._balanced is not None:
            return self._balanced.ids(step * self.global_batch, (step + 1) * self.global_batch)
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self.shards.shard_sizes, self.seed, epoch, self.config.window_shards)
        return self._order.ids(within * self.global_batch, (within + 1) * self.global_batch)

    def announce(self, step: int) -> None:
        """Tell the shards' cache, if there is one, what is read from this step on: a window and the next."""
        cache = self.shards.tars.cache
        if cache is None or self._balanced is not None:
            return
        epoch, within = divmod(step, self.steps_per_epoch)
        self.step_ids(step)
        assert self._order is not None
        window = self._order.window_at(within * self.global_batch)
        if self._announced == (epoch, window):
            return
        self._announced = (epoch, window)
        ahead = self._order.window(window + 1)
        if len(ahead) == 0:
            following = EpochOrder(self.shards.shard_sizes, self.seed, epoch + 1, self.config.window_shards)
            ahead = following.window(0)
        cache.plan([*self._order.window(window).tolist(), *ahead.tolist()])

    def work(self, step: int, start: int, stop: int) -> Work:
        """The part start..stop-1 of a step's global batch, with its crops."""
        epoch, within = divmod(step, self.steps_per_epoch)
        ids = self.step_ids(step)[start:stop]
        rows = self.shards.rows[ids]
        width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        c = self.config
        position = within * self.global_batch + np.arange(start, stop, dtype=np.int64)
        knobs = draw_knobs(c.augment, c.size, self.seed, epoch, position) if c.augment.active else None
        if c.crop == "centre":
            return Work(ids, *centre_boxes(c.eval_crop, width, height), knobs)
        boxes = train_boxes(
            c.crop, c.size, c.pad, c.scale, c.ratio, c.flip, self.seed, epoch, position, width, height
        )
        return Work(ids, *boxes, knobs)

    def known_objects(self, step: int) -> int:
        """How many samples of the step's global batch have a known object.

        Every rank can count it for itself, so no collective is needed.
        """
        return int(np.count_nonzero(self.shards.rows["object"][self.step_ids(step)] >= 0))


def training_work(
    order: TrainingOrder, *, micro_batch: int, rank: int, world: int, first_step: int, last_step: int
) -> Iterator[Work]:
    """A rank's micro-batches of steps first_step..last_step-1, in order."""
    per_rank = order.global_batch // world
    for step in range(first_step, last_step):
        order.announce(step)
        begin = rank * per_rank
        for start in range(begin, begin + per_rank, micro_batch):
            yield order.work(step, start, start + micro_batch)


def evaluation_work(
    shards: ShardSet, config: DataConfig, *, batch: int, rank: int, world: int
) -> Iterator[Work]:
    """A rank's share of every sample exactly once, in batches of at most `batch`."""
    begin, end = len(shards) * rank // world, len(shards) * (rank + 1) // world
    for start in range(begin, end, batch):
        ids = np.arange(start, min(start + batch, end), dtype=np.int64)
        rows = shards.rows[ids]
        boxes = centre_boxes(
            config.eval_crop, rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        )
        yield Work(ids, *boxes)


def _resamples(shards: ShardSet, config: DataConfig, train: bool) -> bool:
    """Whether any box can differ from the network's input in size."""
    low_w, high_w, low_h, high_h = shards.image_sizes()
    if train and config.crop == "random":
        return min(low_w, low_h) + 2 * config.pad < config.size
    if train and config.crop == "random_resized":
        return True
    sides = {max(1, round(config.eval_crop * min(w, h))) for w in (low_w, high_w) for h in (low_h, high_h)}
    return sides != {config.size}


class Loader:
    """Iterates `Batch`es of the given work, in order; holds no randomness.

    Args:
        work: what to load, for instance from `training_work` or `evaluation_work`.
        batch: the most samples one batch of `work` has.
        train: whether the boxes are training crops (they may reach into the padding).

    Raises:
        UserError: an image cannot be decoded; the message names its shard and key.
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
    ) -> None:
        self.shards, self.device = shards, device
        self._work, self._augment = work, config.augment
        self._in_flight: deque[Work] = deque()
        self._pipeline = build_pipeline(
            self._feed(),
            config,
            batch,
            device,
            resample=_resamples(shards, config, train),
            pad=train and config.pad > 0,
            augmented=train and config.augment.in_pipeline,
        )

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        for work in self._work:
            self._in_flight.append(work)
            encoded = [self.shards.read(int(i)) for i in work.ids]
            # DALI takes dense arrays only.
            start, shape = (np.ascontiguousarray(part) for part in (work.boxes[:, :2], work.boxes[:, 2:]))
            inputs = (encoded, start, shape, work.flips)
            if work.knobs is not None:
                for number in np.flatnonzero(work.knobs[:, WEBP]):
                    encoded[number] = through_webp(encoded[number], work.knobs[number, WEBP])
            yield (*inputs, work.knobs) if self._augment.in_pipeline and work.knobs is not None else inputs

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        try:
            if self.device.type == "cuda":
                (images,) = self._pipeline.run(torch.cuda.current_stream(self.device))
            else:
                (images,) = self._pipeline.run()
        except StopIteration:
            raise
        except RuntimeError as error:
            raise self._name_the_culprit(error) from error
        work = self._in_flight.popleft()
        rows = self.shards.rows[work.ids]
        # DALI's buffer outlives this call through DLPack's reference count. NHWC memory
        # seen as NCHW is what PyTorch calls channels_last.
        image = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        labels = torch.from_numpy(np.stack([rows["generator"], rows["object"]]).astype(np.int64))
        labels = labels.to(self.device, non_blocking=True)
        return Batch(image, labels[0], labels[1], torch.from_numpy(work.ids))

    def _name_the_culprit(self, error: RuntimeError) -> Exception:
        """DALI does not say which image killed the pipeline; Pillow finds it."""
        for work in self._in_flight:
            for sample_id in work.ids:
                try:
                    with Image.open(io.BytesIO(self.shards.read(int(sample_id)).tobytes())) as image:
                        image.load()
                except (OSError, ValueError, SyntaxError):
                    where = self.shards.describe(int(sample_id))
                    return UserError(
                        f"{where}: not a decodable image, though it was when written; "
                        f"find what changed with `python launch/shard.py verify {self.shards.folder}`"
                    )
        return error
