r"""How close the two-level shuffle comes to a full permutation, on labels like GenImage's.

    python docs/scaling/shuffle.py --samples 2700000 --samples-per-shard 1000 --batch 2048

On two sets: one whose shards were written in a permutation of the whole, as the sharder does, and
the worst case, whose shards are sorted by generator and object. Whole epochs are in memory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dataio.core.counter_rng import hash64
from dataio.loading.order import EpochOrder
from engines.stats.text_table import text_table

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
    rows: list[Row] = []
    for name, at in (("permuted", written), ("sorted", rank)):
        for window in (*(w for w in windows if w < shards), shards):
            first, second = (EpochOrder(sizes, 0, epoch, window).ids(0, count) for epoch in (0, 1))
            quality = shuffle_quality(first, second, generator[at], label[at], sizes, batch)
            rows.append({"set": name, "window": "all" if window == shards else window, **quality})
    return rows


def shuffle_quality(
    ids: NDArray[np.int64],
    next_ids: NDArray[np.int64],
    generator: NDArray[np.int64],
    label: NDArray[np.int64],
    shard_sizes: NDArray[np.int64],
    batch: int,
) -> dict[str, float]:
    """Measures of the distance of an order to a full permutation.

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
    counts = np.bincount(numbers, minlength=batches * count).reshape(batches, count)
    shares = np.bincount(classes, minlength=count) / total
    present = shares > 0
    expected = batch * shares[present]
    chi_square = ((counts[:, present] - expected) ** 2 / expected).sum(axis=1).mean()
    return float(chi_square / ((present.sum() - 1) * (total - batch) / (total - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2_700_000, help="in the training split")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2048, help="images of a step")
    args = parser.parse_args()
    rows = compare_shuffles(args.samples // args.samples_per_shard, args.samples_per_shard, args.batch)
    heads = [name.replace("_", " ") for name in rows[0]]
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(text_table(cells, heads, markdown=True))


if __name__ == "__main__":
    main()
