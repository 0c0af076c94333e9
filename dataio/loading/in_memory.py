"""A split decoded once and held on the device, and batches cut from it without decoding.

For sets that fit: CIFAKE is 307 MB of pixels, all of GenImage at 256 px 531 GB. The order, the
boxes, the flips and the pixels are the same as those of `dataio.loading.loader.Loader`. On a CPU
batches are bit-identical without resampling, and within one gray level with it (ties are rounded
in different directions).
Every process holds the whole of its splits.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.loading.augment import ERASE
from dataio.loading.config import DataConfig
from dataio.loading.loader import Batch, Loader, resamples
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import BatchSpec
from dataio.shards.shard_set import ShardSet

# Images decoded together. The loader has checked their headers; without that check a chunk would have
# to stay below 32, see `dataio.images.headers`.
_CHUNK = 256
# Pixels of a side up to which the CPU decodes for a GPU, too: in a small image, a GPU's decoder waits
# for its launches most of the time.
_SMALL = 128


class InMemorySplit:
    """The decoded images of a split, all of one size; see `preload`.

    Attributes:
        pixels: uint8 [N, height + 2 pad, width + 2 pad, 3] on the device, RGB, in a border of the
            mean color. Those of damaged samples are undefined; the quarantine names them.
        generator, object_label: int64 [N] on the device.
        pad: pixels of the border. seconds: what decoding took.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        device: torch.device,
        pad: int,
        quarantine: Quarantine | None = None,
    ) -> None:
        begin = time.perf_counter()
        height, width = _size(shards)
        self.pad = pad
        self.pixels = torch.empty(_shape(shards, pad), dtype=torch.uint8, device=device)
        if pad:
            # DALI's slice truncates its fill value.
            self.pixels[:] = torch.from_numpy((255.0 * np.array(config.mean)).astype(np.uint8)).to(device)
        whole = _whole_images(len(shards), height, width)
        inner = self.pixels[:, pad : pad + height, pad : pad + width]
        decoder = torch.device("cpu") if max(height, width) <= _SMALL else device
        loader = Loader(
            shards,
            config,
            whole,
            batch=_CHUNK,
            device=decoder,
            train=False,
            raw=True,
            quarantine=quarantine,
        )
        for loaded in loader:
            image, ids = loaded.image.permute(0, 2, 3, 1), loaded.sample_id
            if decoder != device:
                image = image.pin_memory()
            first, last = int(ids[0]), int(ids[-1])
            if last - first + 1 == len(ids):  # none is damaged
                inner[first : last + 1].copy_(image, non_blocking=True)
            else:
                inner[ids.to(device)] = image.to(device)
        labels = np.stack([shards.rows["generator"], shards.rows["object"]]).astype(np.int64)
        self.generator, self.object_label = torch.from_numpy(labels).to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - begin


def _size(shards: ShardSet) -> tuple[int, int]:
    """(height, width) of all images of a split, pixels."""
    low_w, high_w, low_h, high_h = shards.image_sizes()
    if (low_w, low_h) != (high_w, high_h):
        raise UserError(
            f"data.resident: the {shards.split} images of {shards.folder} are {low_w} to {high_w} px wide and "
            f"{low_h} to {high_h} px high, expected one size; shard them with the codec preset default "
            "(--codec.preset default), or set data.resident false"
        )
    return low_h, low_w


def _shape(shards: ShardSet, pad: int) -> tuple[int, int, int, int]:
    height, width = _size(shards)
    return len(shards), height + 2 * pad, width + 2 * pad, 3


def _whole_images(count: int, height: int, width: int) -> Iterator[BatchSpec]:
    for start in range(0, count, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, count), dtype=np.int64)
        boxes = np.tile(np.array([0, 0, height, width], np.int32), (len(ids), 1))
        yield BatchSpec(ids, boxes, np.zeros(len(ids), np.int32))


def preload(
    config: DataConfig,
    device: torch.device,
    train: ShardSet,
    val: ShardSet | None = None,
    *,
    train_quarantine: Quarantine | None = None,
    val_quarantine: Quarantine | None = None,
) -> tuple[InMemorySplit, InMemorySplit | None]:
    """Decode the splits into memory, after a check that both fit.

    Args:
        device: where the pixels are held; the CPU decodes small images even for a GPU.
        train: gets the border that `config.pad` asks for.

    Raises:
        UserError: images of several sizes; more bytes than are free; a sample that cannot be
            decoded, where the split has no quarantine.
    """
    needed = [(train, config.pad), *([] if val is None else [(val, 0)])]
    _check_room([(s, int(np.prod(_shape(s, pad)))) for s, pad in needed], device)
    decoded = InMemorySplit(train, config, device, config.pad, train_quarantine)
    return decoded, None if val is None else InMemorySplit(val, config, device, 0, val_quarantine)


def held_bytes(config: DataConfig, train: ShardSet, val: ShardSet | None = None) -> int:
    """The bytes that `preload` holds in each process.

    Raises:
        UserError: images of several sizes.
    """
    sizes = [_shape(train, config.pad), *([] if val is None else [_shape(val, 0)])]
    return sum(int(np.prod(size)) for size in sizes)


def _check_room(needed: Sequence[tuple[ShardSet, int]], device: torch.device) -> None:
    # Processes of a machine share its memory; each GPU has its own.
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total, free = copies * sum(size for _, size in needed), free_memory(device)
    if free is None or total <= free:
        return
    images = " and ".join(f"{len(shards)} {shards.split}" for shards, _ in needed)
    each = f" in each of {copies} processes" if copies > 1 else ""
    raise UserError(
        f"data.resident: {images} images{each} need {total / 2**30:.2f} GiB and {free / 2**30:.2f} GiB of "
        f"{device} memory are free; set data.resident false, or select less with data.subsets or data.generators"
    )


def free_memory(device: torch.device, root: str = "/") -> int | None:
    """Free bytes on the device; None where the system does not say.

    Args:
        root: where a test has its /proc and /sys. A control group's limit counts, version 2 or 1.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    bounds = []
    for line in _text(Path(root) / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            bounds.append(int(line.split()[1]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = [_text(Path(root) / "sys/fs/cgroup" / name).strip() for name in (limit, used)]
        if all(map(str.isdecimal, numbers)):
            bounds.append(max(0, int(numbers[0]) - int(numbers[1])))
    return min(bounds, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class InMemoryLoader:
    """Iterates `Batch`es of the given work, in order, out of an `InMemorySplit`.

    The batches equal those of `dataio.loading.loader.Loader`: substitutes for samples in the quarantine,
    smaller batches in evaluation. No operation waits for the device.

    Where `resampled` is false, a batch is a function of one small tensor, so that a CUDA graph can make
    it: capture `gather` of a buffer, then copy each `next_columns` there and replay.

    Args:
        half: on a GPU, give float16 images; rounded last of all.

    Attributes:
        resampled: whether boxes are scaled to the network's input. columns: rows of `next_columns`.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: InMemorySplit,
        config: DataConfig,
        work: Iterator[BatchSpec],
        *,
        device: torch.device,
        train: bool,
        half: bool = False,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.shards, self._split, self.device, self._quarantine = shards, split, device, quarantine
        self._work, self._size = work, config.size
        self._erases = train and config.augment.erase > 0
        self.resampled = resamples(shards, config, train)
        self.columns = 10 if self._erases else 6
        self._dtype = torch.float16 if half and device.type == "cuda" else torch.float32
        # DALI's crop_mirror_normalize computes (pixel - mean) * (1 / std), all in float32.
        mean, std = (
            np.array([255.0 * v for v in values], np.float32) for values in (config.mean, config.std)
        )
        # Whole rows of pixels at a time: longer loops.
        self._mean, self._scale = (
            torch.from_numpy(np.tile(row, self._size)).to(device) for row in (mean, np.float32(1) / std)
        )

        self._runs: NDArray[Any] | None = None
        if device.type == "cpu" and not self.resampled:
            # A view of `size` pixels from each pixel on, as one value that NumPy copies at once.
            flat = self._split.pixels.numpy()
            self._runs = np.ndarray(
                (flat.size // 3 - self._size + 1,), f"V{3 * self._size}", flat.data, 0, (3,)
            )

    def __iter__(self) -> "InMemoryLoader":
        return self

    def __next__(self) -> Batch:
        return self._loaded(self._next_work())

    def next_columns(self) -> torch.Tensor:
        """What `gather` takes for the next batch, instead of the batch.

        Returns:
            int64 [K, N] on the CPU, the caller's own, in pinned memory for a GPU; the first row is the
            samples' ids. K does not change; N is smaller where damaged samples are left out, and at
            the end of an evaluation.
        """
        return self._columns(self._next_work())

    def gather(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image, generator and object label of a `Batch`, by operations on the device alone.

        Args:
            columns: int64 [K, N] on the device, see `next_columns`.
        """
        assert not self.resampled
        return self._finished(self._cut_by_index(columns), columns)

    def _next_work(self) -> BatchSpec:
        for planned in self._work:
            work = self._undamaged(planned)
            if len(work.ids):
                return work
        raise StopIteration

    def _undamaged(self, planned: BatchSpec) -> BatchSpec:
        quarantine = self._quarantine
        if quarantine is None or quarantine.ids.isdisjoint(planned.ids.tolist()):
            return planned
        if planned.with_ids is not None:
            ids = [next(quarantine.candidates(number)) for number in planned.ids.tolist()]
            return planned.with_ids(np.array(ids, np.int64))
        kept = ~np.isin(planned.ids, list(quarantine.ids))
        return BatchSpec(planned.ids[kept], planned.boxes[kept], planned.flips[kept])

    def _columns(self, work: BatchSpec) -> torch.Tensor:
        numbers: list[NDArray[Any]] = [work.ids[:, None], work.boxes, work.flips[:, None]]
        if self._erases:
            assert work.params is not None
            numbers.append(work.params[:, ERASE : ERASE + 4].astype(np.int64))
        table = np.concatenate(numbers, axis=1).astype(np.int64).T
        columns = torch.from_numpy(np.ascontiguousarray(table))
        return columns.pin_memory() if self.device.type == "cuda" else columns

    def _loaded(self, work: BatchSpec) -> Batch:
        # One transfer for all of them.
        columns = self._columns(work).to(self.device, non_blocking=True)
        if self.resampled:
            found = self._finished(self._resampled(columns, work), columns)
        elif self.device.type == "cpu":
            found = self._finished(self._cut(work), columns)
        else:
            found = self.gather(columns)
        return Batch(*found, torch.from_numpy(work.ids))

    def _finished(
        self, pixels: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch of cut pixels, uint8 [N, size, size, 3]."""
        count, size = len(pixels), self._size
        rows = torch.sub(pixels.view(count, size, 3 * size), self._mean).mul_(self._scale)
        image = rows.view(count, size, size, 3)
        if self._erases:
            image.masked_fill_(_erased(columns[6:], size), 0.0)
        image = image.to(self._dtype).permute(0, 3, 1, 2)
        return image, self._split.generator[columns[0]], self._split.object_label[columns[0]]

    def _cut(self, work: BatchSpec) -> torch.Tensor:
        """The boxes' pixels by copies of whole rows, uint8 [N, size, size, 3]; on a CPU."""
        size, pad = self._size, self._split.pad
        height, width = self._split.pixels.shape[1:3]
        y, x = (work.boxes[:, axis].astype(np.int64) + pad for axis in (0, 1))
        first = (work.ids * height + y) * width + x
        assert self._runs is not None
        rows = self._runs[first[:, None] + width * np.arange(size)]
        flipped = work.flips != 0
        if flipped.any():
            pixels = rows.view("V3").reshape(-1, size, size)
            pixels[flipped] = pixels[flipped][:, :, ::-1]
        return torch.from_numpy(rows.view(np.uint8).reshape(-1, size, size, 3))

    def _cut_by_index(self, columns: torch.Tensor) -> torch.Tensor:
        """The same by one gather of pixels, on any device; columns: int64 [>= 6, N]."""
        stored, pad = self._split.pixels, self._split.pad
        height, width = stored.shape[1:3]
        ids, y, x, _, _, flips = columns[:6, :, None, None]
        along = torch.arange(self._size, device=stored.device)
        across = torch.where(flips != 0, self._size - 1 - along, along)
        index = ((ids * height + y + pad + along[:, None]) * width) + x + pad + across
        return stored.view(-1, 3)[index]

    def _resampled(self, columns: torch.Tensor, work: BatchSpec) -> torch.Tensor:
        """The boxes scaled to the network's input, uint8 [N, size, size, 3]."""
        stored, size, pad = self._split.pixels, self._size, self._split.pad
        ids, y, x, high, wide, flips = columns[:6]
        reach = int(np.ceil(max(1.0, work.boxes[:, 2:].max() / size))) + 1
        down = triangle_weights(y + pad, high, size, stored.shape[1], reach)
        across = triangle_weights(x + pad, wide, size, stored.shape[2], reach)
        across = torch.where(flips[:, None, None] != 0, across.flip(1), across)
        # Evaluation runs under autocast, whose half precision differs from DALI's float32.
        with torch.autocast(stored.device.type, enabled=False):
            image = stored[ids].flatten(2).float()
            image = torch.bmm(down, image).view(len(ids), size, -1, 3).transpose(1, 2).flatten(2)
            image = torch.bmm(across, image).view(len(ids), size, size, 3).transpose(1, 2)
        return image.round_().clamp_(0, 255).to(torch.uint8).contiguous()


def triangle_weights(
    start: torch.Tensor, length: torch.Tensor, size: int, side: int, reach: int
) -> torch.Tensor:
    """Weights of a line's pixels in its box scaled to `size` pixels.

    The filter is a triangle, widened where the box shrinks; taps beyond the box take the
    pixel at its end, as DALI's resize has it (torch's interpolate leaves them out).

    Args:
        start, length: int64 [N], of the boxes, pixels. side: of the line. reach: pixels, more than
            half a widened triangle.

    Returns:
        float32 [N, size, side]; rows sum to 1, and are 0 outside of the box.
    """
    first, last = start[:, None, None], (start + length - 1)[:, None, None]
    scale = length.float()[:, None, None] / size
    along = torch.arange(size, device=start.device).float()[None, :, None]
    center = (along + 0.5) * scale - 0.5 + first
    taps = torch.arange(-reach, side + reach, device=start.device)
    weights = (1 - (taps - center).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights /= weights.sum(2, keepdim=True)
    before = torch.where(taps < first, weights, 0).sum(2, keepdim=True)
    behind = torch.where(taps > last, weights, 0).sum(2, keepdim=True)
    weights = torch.where((taps >= first) & (taps <= last), weights, 0)
    weights += (taps == first) * before + (taps == last) * behind
    return weights[:, :, reach : reach + side].contiguous()


def _erased(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Where the rectangles (y, x, height, width) int64 [4, N] are: bool [N, size, size, 1]."""
    y, x, high, wide = boxes[:, :, None]
    along = torch.arange(size, device=boxes.device)
    rows, columns = ((along >= a) & (along < a + n) for a, n in ((y, high), (x, wide)))
    return (rows[:, :, None] & columns[:, None, :])[..., None]
