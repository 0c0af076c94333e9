"""The order of samples and their augmentation, as pure functions of (seed, epoch, position).

Nothing here has state, so a run resumes in mid-epoch from three integers, and a run
continued on another number of processes sees the same images with the same crops: the
order is computed for the *global* batch and sliced by rank afterwards.

Randomness is counter-based: the finaliser of SplitMix64 (Steele, Lea & Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014) over a running hash. NumPy's
generators are not used because their streams may change between NumPy versions.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_Words = NDArray[np.uint64] | np.uint64

# Purposes keep streams apart that share seed, epoch and position.
PURPOSE_SHARDS = 1
PURPOSE_SAMPLES = 2
PURPOSE_CROP = 3
PURPOSE_MIX = 4
PURPOSE_FORWARD = 5
PURPOSE_CLASSES = 6
PURPOSE_AUGMENT = 7
PURPOSE_SUBSTITUTE = 8


def hash64(*words: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash a sequence of 64-bit words; arrays broadcast.

    Returns:
        uint64 array of the words' broadcast shape, uniform over 64 bits.
    """
    state: _Words = np.uint64(0)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        for word in words:
            state = _absorbed(state, np.asarray(word).astype(np.uint64))
    return np.asarray(state)


def _absorbed(state: _Words, word: _Words) -> _Words:
    """The running hash after one more word."""
    state = (state ^ (word + _GOLDEN)) + _GOLDEN
    state = (state ^ (state >> _SHIFT_1)) * _MIX_1
    state = (state ^ (state >> _SHIFT_2)) * _MIX_2
    return state ^ (state >> _SHIFT_3)


@lru_cache(maxsize=64)
def _prefix(seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """The running hash of the words that all positions of an epoch share, uint64 [1]."""
    return hash64(seed, epoch, purpose).reshape(1)


def uniforms(
    seed: int, epoch: int, purpose: int, position: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1): the draws 0..draws-1 of each position, float64 [draws, *position.shape]."""
    state = _absorbed(_prefix(seed, epoch, purpose), position.astype(np.uint64))
    numbers = np.arange(draws, dtype=np.uint64).reshape(-1, *[1] * position.ndim)
    bits = np.asarray(_absorbed(state, numbers))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(
    seed: int, epoch: int, purpose: int, position: NDArray[np.int64], draw: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per position; `draw` numbers the draws of a position."""
    bits = hash64(seed, epoch, purpose, position.astype(np.uint64), draw)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class EpochOrder:
    """A two-level shuffle of one epoch: shards, then samples within a window of shards.

    Reads stay local (only `window_shards` tars are touched at a time) and memory is one
    window, never a permutation of all samples. Shards are written in a seeded permutation
    already, so a window is a random subset of the data set.

    Args:
        shard_sizes: int64 [shards], the number of samples in each shard.
        seed, epoch: of the run and the epoch; equal ones give the equal order.
        window_shards: how many shards are mixed; at least 1.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], seed: int, epoch: int, window_shards: int) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.epoch = seed, epoch
        self._first_id = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._sizes, self._count = sizes, int(sizes.sum())
        shard_keys = hash64(seed, epoch, PURPOSE_SHARDS, np.arange(len(sizes), dtype=np.uint64))
        self._shards = np.argsort(shard_keys, kind="stable")
        ends = np.cumsum(sizes[self._shards])
        last_of_window = np.arange(window_shards - 1, len(sizes) + window_shards - 1, window_shards)
        self._window_ends = ends[np.minimum(last_of_window, len(sizes) - 1)] if len(sizes) else ends
        self._window_shards = window_shards
        self._ids = lru_cache(maxsize=2)(self._permuted_window)

    def __len__(self) -> int:
        return self._count

    def window_at(self, position: int) -> int:
        """Number of the window that a position of the epoch lies in."""
        return int(np.searchsorted(self._window_ends, position, side="right"))

    def window(self, number: int) -> NDArray[np.int64]:
        """The shards of a window, int64 [<= window_shards]; none behind the last one."""
        return self._shards[number * self._window_shards : (number + 1) * self._window_shards]

    def _permuted_window(self, number: int) -> NDArray[np.int64]:
        shards = self.window(number)
        ids = np.concatenate([self._first_id[s] + np.arange(self._sizes[s], dtype=np.int64) for s in shards])
        keys = hash64(self.seed, self.epoch, PURPOSE_SAMPLES, ids.astype(np.uint64))
        return ids[np.argsort(keys, kind="stable")]

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sample ids at positions start..stop-1 of this epoch, int64 [stop - start]."""
        parts = [self._ids(number)[part] for number, part in self._parts(start, stop)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def id_sets(self, start: int, stop: int) -> Iterator[NDArray[np.int64] | slice]:
        """The ids of `ids(start, stop)` in any order, in parts: a shard of a whole window is a slice.

        A global batch of a million images is many windows, of which only the first and the last
        have to be shuffled to know who is in it.
        """
        for number, part in self._parts(start, stop):
            shards = self.window(number)
            if part.stop - part.start < int(self._sizes[shards].sum()):
                yield self._ids(number)[part]
            else:
                for first, size in zip(
                    self._first_id[shards].tolist(), self._sizes[shards].tolist(), strict=True
                ):
                    yield slice(first, first + size)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The windows that positions start..stop-1 lie in, and their part of each."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start}..{stop} outside an epoch of {len(self)} samples")
        while start < stop:
            number = self.window_at(start)
            begin = int(self._window_ends[number - 1]) if number else 0
            end = min(stop, int(self._window_ends[number]))
            yield number, slice(start - begin, end - begin)
            start = end


def train_boxes(
    crop: str,
    size: int,
    pad: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    seed: int,
    epoch: int,
    position: NDArray[np.int64],
    width: NDArray[np.int64],
    height: NDArray[np.int64],
    step: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Crop boxes and flips of training samples.

    Args:
        crop: "random" (a square of `size` px after padding by `pad`, never resampled where
            the image is large enough) or "random_resized" (area `scale`, aspect `ratio`;
            Szegedy et al., "Going deeper with convolutions", as in torchvision, but
            without its rejection loop: a box that does not fit is shrunk to fit).
        size, pad: pixels. scale: of the area. ratio: width / height. flip: probability.
        position: int64 [N], positions in the epoch; width, height: int64 [N], pixels.
        step: with "random", boxes begin at -pad, -pad + step and so on.

    Returns:
        boxes int32 [N, 4] as (y, x, height, width) in source pixels, y and x negative
        inside the padding; flips int32 [N], 0 or 1.
    """
    draw = uniforms(seed, epoch, PURPOSE_CROP, position, 3 if crop == "random" else 5)
    if crop == "random":
        box_w = np.minimum(size, width + 2 * pad)
        box_h = np.minimum(size, height + 2 * pad)
        slack_w, slack_h = width + 2 * pad - box_w, height + 2 * pad - box_h
    else:
        area = width * height * (scale[0] + draw[3] * (scale[1] - scale[0]))
        log_ratio = np.log(ratio[0]) + draw[4] * (np.log(ratio[1]) - np.log(ratio[0]))
        aspect = np.exp(log_ratio)
        box_w = np.clip(np.rint(np.sqrt(area * aspect)), 1, width).astype(np.int64)
        box_h = np.clip(np.rint(np.sqrt(area / aspect)), 1, height).astype(np.int64)
        slack_w, slack_h = width - box_w, height - box_h
        pad, step = 0, 1
    x = step * np.floor(draw[0] * (slack_w // step + 1)).astype(np.int64) - pad
    y = step * np.floor(draw[1] * (slack_h // step + 1)).astype(np.int64) - pad
    boxes = np.stack([y, x, box_h, box_w], axis=1).astype(np.int32)
    return boxes, (draw[2] < flip).astype(np.int32)


def centre_boxes(
    fraction: float, width: NDArray[np.int64], height: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Evaluation's boxes: the centred square of side round(fraction * shortest side), no flip.

    Returns:
        boxes int32 [N, 4] as (y, x, height, width); flips int32 [N], all 0.
    """
    side = np.maximum(1, np.rint(fraction * np.minimum(width, height))).astype(np.int64)
    boxes = np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)
    return boxes.astype(np.int32), np.zeros(len(boxes), np.int32)
