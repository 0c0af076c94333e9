"""How near the two-level shuffle comes to a full permutation, on labels like GenImage's.

Two sets: one whose shards were written in a permutation of the whole, as the sharder does, and the
worst there is, whose shards are sorted by generator and object.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dataio.core.counter_rng import hash64
from dataio.loading.order import EpochOrder

WINDOWS = (1, 4, 16, 64)
_FAKE_GENERATORS, _OBJECTS = 8, 1000  # GenImage's; half of its images are photographs
Row = dict[str, float | int | str]


def compare_shuffles(
    shards: int, samples_per_shard: int, batch: int, windows: Sequence[int] = WINDOWS
) -> list[Row]:
    """`shuffle_quality` of each window and of a full permutation (window "all"), on both sets."""
    count = shards * samples_per_shard
    sizes = np.full(shards, samples_per_shard, np.int64)
    rank = np.arange(count, dtype=np.int64)
    generator = np.maximum(0, rank * 2 * _FAKE_GENERATORS // count - _FAKE_GENERATORS + 1)
    label = rank * 2 * _FAKE_GENERATORS * _OBJECTS // count % _OBJECTS
    written = np.argsort(hash64(0, rank.astype(np.uint64)), kind="stable")
    found: list[Row] = []
    for name, at in (("permuted", written), ("sorted", rank)):
        for window in (*(w for w in windows if w < shards), shards):
            first, second = (EpochOrder(sizes, 0, epoch, window).ids(0, count) for epoch in (0, 1))
            quality = shuffle_quality(first, second, generator[at], label[at], sizes, batch)
            found.append({"set": name, "window": "all" if window == shards else window, **quality})
    return found


def shuffle_quality(
    ids: NDArray[np.int64],
    next_ids: NDArray[np.int64],
    generator: NDArray[np.int64],
    label: NDArray[np.int64],
    shard_sizes: NDArray[np.int64],
    batch: int,
) -> dict[str, float]:
    """What tells an order from a full permutation.

    Args:
        ids, next_ids: int64 [N], the samples in the order of two epochs. generator, label:
            int64 [N], of each sample; generator 0 is a photograph. shard_sizes: int64 [shards].
        batch: images of a step.

    Returns:
        position_and_id: Spearman's rank correlation; of a full permutation 0, give or take N^-1/2.
        label_and_next: of real or fake at neighbouring places, Pearson's; the same.
        generator_spread, object_spread: chi-square of a batch's counts, averaged over batches, over
            its mean under sampling without replacement, (K - 1) (N - batch) / (N - 1) for K classes
            (the multivariate hypergeometric's variances); 1 of a full permutation.
        neighbours_of_one_shard: share of neighbouring places.
        epoch_and_next: Spearman's, of a sample's places in the two epochs; 0.
    """
    places = np.arange(len(ids))
    then = np.empty(len(ids), np.int64)
    then[next_ids] = places
    shard = np.repeat(np.arange(len(shard_sizes)), shard_sizes)[ids]
    fake = (generator[ids] != 0).astype(np.float64)
    return {
        "position_and_id": float(spearmanr(places, ids).statistic),
        "label_and_next": float(np.corrcoef(fake[1:], fake[:-1])[0, 1]),
        "generator_spread": _spread(generator[ids], batch),
        "object_spread": _spread(label[ids], batch),
        "neighbours_of_one_shard": float(np.mean(shard[1:] == shard[:-1])),
        "epoch_and_next": float(spearmanr(places, then[ids]).statistic),
    }


def _spread(classes: NDArray[np.int64], batch: int) -> float:
    """The batches' mean chi-square over its expectation."""
    count, total = int(classes.max()) + 1, len(classes)
    batches = total // batch
    numbers = np.repeat(np.arange(batches), batch) * count + classes[: batches * batch]
    seen = np.bincount(numbers, minlength=batches * count).reshape(batches, count)
    shares = np.bincount(classes, minlength=count) / total
    there = shares > 0
    wanted = batch * shares[there]
    chi_square = ((seen[:, there] - wanted) ** 2 / wanted).sum(axis=1).mean()
    return float(chi_square / ((there.sum() - 1) * (total - batch) / (total - 1)))


def shuffle_table(rows: Sequence[Row]) -> str:
    """The rows of `compare_shuffles` as a Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
