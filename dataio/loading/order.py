"""The order of samples and their augmentation, as pure functions of (seed, epoch, position).

Nothing here has state, so a run resumes in mid-epoch from three integers, and a run
continued on another number of processes sees the same images with the same crops: the
order is computed for the *global* batch and sliced by rank afterwards.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dataio.core.counter_rng import PURPOSE_SAMPLES, PURPOSE_SHARDS, hash64


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

    def windows_within(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the windows that any of the ranges starts[i]..stops[i]-1 lies in, ascending.

        Args:
            starts, stops: int64 [R], positions of the epoch; no range is empty.
        """
        first = np.searchsorted(self._window_ends, starts, side="right")
        last = np.searchsorted(self._window_ends, stops - 1, side="right")
        depth = np.zeros(len(self._window_ends) + 1, np.int64)
        np.add.at(depth, first, 1)
        np.add.at(depth, last + 1, -1)
        return np.flatnonzero(np.cumsum(depth)[:-1] > 0)

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
