"""Balanced sampling of generators, as a pure function of position.

GenImage has 6.7 photographs for each image of a generator. Positions are cut into blocks;
every block has the same number of each class in a hashed order, and a class gives its
images in turn: all of them once, in its own two-level shuffle, before any comes again. The
rotation goes on over epochs, which are as long as without it.
"""

import numpy as np
from numpy.typing import NDArray

from dataio.core.counter_rng import PURPOSE_CLASSES, hash64
from dataio.loading.order import EpochOrder
from dataio.shards.shard_set import ShardSet

# Positions of a block where the shares are not equal: enough to round them well.
_BLOCK = 256


def class_counts(shards: ShardSet) -> NDArray[np.int64]:
    """How many selected images each generator has, int64 [generators]."""
    return np.bincount(shards.rows["generator"], minlength=len(shards.labels.generators)).astype(np.int64)


class BalancedOrder:
    """Sample ids by position, with balanced generators.

    Args:
        shards: the split. seed: of the run. window_shards: see `EpochOrder`; each class has
            its own window, so more tars are touched at a time than without balancing.
        rule: "balanced" (equal shares) or "square_root" (in proportion to the root of the
            class's count).
    """

    def __init__(self, shards: ShardSet, seed: int, window_shards: int, rule: str) -> None:
        counts = class_counts(shards)
        classes = np.flatnonzero(counts)
        shares = np.ones(len(classes)) if rule == "balanced" else np.sqrt(counts[classes])
        size = len(classes) if rule == "balanced" else _BLOCK
        self._per_block = np.maximum(1, np.rint(size * shares / shares.sum())).astype(np.int64)
        self._class = np.repeat(np.arange(len(classes)), self._per_block)
        self._seed, self._window = seed, window_shards
        generator, shard = shards.rows["generator"], shards.rows["shard"]
        self._rows = [np.flatnonzero(generator == c).astype(np.int64) for c in classes]
        self._sizes = [np.bincount(shard[rows], minlength=len(shards.shards)) for rows in self._rows]
        self._cycles: dict[int, tuple[int, EpochOrder]] = {}

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sample ids at positions start..stop-1, counted over all epochs; int64 [stop - start]."""
        size = len(self._class)
        first, last = start // size, -(-stop // size)
        blocks = np.arange(first, last, dtype=np.uint64)[:, None]
        keys = hash64(self._seed, PURPOSE_CLASSES, blocks, np.arange(size, dtype=np.uint64)[None])
        drawn = self._class[np.argsort(keys, axis=1, kind="stable")]  # class by block and slot
        chosen = slice(start - first * size, stop - first * size)
        ids = np.empty(stop - start, np.int64)
        for number, per_block in enumerate(self._per_block):
            of_class = drawn == number
            # Its draws count up along the positions, so that its cycles do not overlap.
            turns = np.cumsum(of_class, axis=1) - 1 + per_block * blocks.astype(np.int64)
            here, draws = of_class.ravel()[chosen], turns.ravel()[chosen]
            if here.any():
                draws = draws[here]
                ids[here] = self._draws(number, int(draws[0]), int(draws[-1]) + 1)
        return ids

    def _draws(self, number: int, start: int, stop: int) -> NDArray[np.int64]:
        """The draws start..stop-1 of a class."""
        rows = self._rows[number]
        parts = []
        while start < stop:
            cycle, within = divmod(start, len(rows))
            end = min(len(rows), within + stop - start)
            parts.append(rows[self._cycle(number, cycle).ids(within, end)])
            start += end - within
        return np.concatenate(parts)

    def _cycle(self, number: int, cycle: int) -> EpochOrder:
        kept = self._cycles.get(number)
        if kept is None or kept[0] != cycle:
            seed = int(hash64(self._seed, PURPOSE_CLASSES, number))
            kept = (cycle, EpochOrder(self._sizes[number], seed, cycle, self._window))
            self._cycles[number] = kept
        return kept[1]
