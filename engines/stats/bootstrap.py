"""The bootstrap: seeded 95 % percentile intervals of many figures at once.

Images (or whole groups of images) are not copied: a resample is a vector of weights, how
often each was drawn, and every figure is computed from weights on scores that are sorted once.
A batch of resamples is one matrix of weights.

* Over images: each generator's images are resampled among themselves, since a test set fixes
  their number (a stratified bootstrap; Efron and Tibshirani 1993, chapter 8).
* Over groups: whole groups are resampled, whatever they hold (a cluster bootstrap; Field and
  Welsh 2007), because images of one group are not independent.
* Over generators: for a mean over generators, the generators are resampled too, each with the
  value of its resampled images.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.stats.scores import RATES, Bools, Floats

LEVEL = 0.95
RANKED = ("auroc", "ap", *RATES)
_CHUNK = 1 << 17  # weights in one batch: small enough for the caches
_TINY = 1e-300
# The share of resamples that may lack every image a figure needs; above it there is no interval.
_MAX_UNDEFINED = 0.05


@dataclass(frozen=True)
class Figures:
    """Figures of B resamples: overall [B], and of each generator [B, G] (column 0 is nature)."""

    overall: Mapping[str, Floats]
    each: Mapping[str, Floats]


class Sample:
    """The images of a test set, in an order that does not depend on their table's."""

    def __init__(
        self,
        generator: NDArray[np.int64],
        names: int,
        sample_id: NDArray[np.int64],
        cluster: NDArray[np.int64] | None = None,
    ) -> None:
        """Sort the images by generator, then id.

        Args:
            generator: int64 [N], 0 is nature. names: how many generators there are, G.
            sample_id: int64 [N], unique. cluster: int64 [N], equal for images of one group.
        """
        self.order = np.lexsort((sample_id, generator))
        self.generator = generator[self.order]
        self.generators = names
        self.starts = np.searchsorted(self.generator, np.arange(names + 1))
        self.cluster: NDArray[np.int64] | None = None
        if cluster is not None:
            # Numbered by first occurrence in this order, so that the draws do not depend on the table's.
            _, first, codes = np.unique(cluster[self.order], return_index=True, return_inverse=True)
            rank = np.argsort(np.argsort(first))
            self.cluster = rank[codes]

    def __len__(self) -> int:
        return len(self.generator)

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Each generator that has images, with its place in the order."""
        for index, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            if stop > start:
                yield index, slice(int(start), int(stop))

    def weights(self, random: np.random.Generator, count: int, *, grouped: bool = False) -> Floats:
        """How often each image is in each of `count` resamples: float64 [count, N], whole numbers."""
        if grouped:
            assert self.cluster is not None
            return _drawn(random, count, int(self.cluster.max()) + 1)[:, self.cluster]
        parts = [_drawn(random, count, block.stop - block.start) for _, block in self.blocks()]
        return np.concatenate(parts, axis=1) if parts else np.zeros((count, 0))

    def units(self, counted: Bools | None, block: slice, *, grouped: bool) -> int:
        """How many independent images or groups a figure rests on; `counted` is in this order."""
        rows = np.arange(block.start, block.stop)
        if counted is not None:
            rows = rows[counted[block]]
        if not grouped:
            return len(rows)
        assert self.cluster is not None
        return len(np.unique(self.cluster[rows]))


def _drawn(random: np.random.Generator, count: int, size: int) -> Floats:
    """Draw `size` of `size` items with replacement, `count` times: how often each, [count, size]."""
    draws = random.integers(0, size, (count, size))
    draws += (np.arange(count) * size)[:, None]
    return np.bincount(draws.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


class Shares:
    """Weighted means of values by image, such as the share of wrong answers."""

    def __init__(self, sample: Sample, columns: Mapping[str, tuple[NDArray[Any], Bools | None]]) -> None:
        """Sort the columns as the sample is.

        Args:
            columns: by name, a value for each image [N] and which images count (None: all),
                both in the table's order.
        """
        self._sample = sample
        self.names = tuple(columns)
        self.counted = {n: None if m is None else m[sample.order] for n, (_, m) in columns.items()}
        everyone = np.ones(len(sample))
        matrix = [everyone]
        for name, (values, _) in columns.items():
            mask = self.counted[name]
            sorted_values = np.asarray(values, np.float64)[sample.order]
            matrix.append(sorted_values if mask is None else np.where(mask, sorted_values, 0.0))
            if mask is not None:
                matrix.append(mask.astype(np.float64))
        self._matrix = np.stack(matrix, axis=1)

    def sums(self, weights: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Sums of the values and of the weights that count, by name: each [B, G]."""
        total = np.zeros((len(weights), self._sample.generators, self._matrix.shape[1]))
        for index, block in self._sample.blocks():
            total[:, index] = weights[:, block] @ self._matrix[block]
        values, counts, column = {}, {}, 1
        for name in self.names:
            values[name], counts[name] = total[..., column], total[..., 0]
            column += 1
            if self.counted[name] is not None:
                counts[name] = total[..., column]
                column += 1
        return values, counts


class Ranking:
    """AUROC, AP and detection at a false-alarm rate, of fakes against photographs, for any weights."""

    def __init__(self, sample: Sample, p: Floats) -> None:
        """Sort the scores p [N], in the table's order, once for all resamples."""
        score = p[sample.order]
        self.real = int(sample.starts[1])
        self._generators = sample.generators
        self._kept = threading.local()
        self._present = [index for index, _ in sample.blocks() if index]
        self._reals = np.argsort(score[: self.real], kind="stable")
        real_scores = score[self._reals]
        self._fakes = np.lexsort((score[self.real :], sample.generator[self.real :])) + self.real
        fakes = score[self._fakes]
        self._starts = np.array([sample.starts[index] - self.real for index in self._present], np.int64)
        self._below = np.searchsorted(real_scores, fakes, side="left")
        self._upto = np.searchsorted(real_scores, fakes, side="right")
        self._ties = bool((self._below != self._upto).any())
        stops = np.append(self._starts, len(fakes))[1:]
        # Where each fake's run of equal scores begins and where its generator ends.
        runs = [a + _first(fakes[a:b]) for a, b in zip(self._starts, stops, strict=True)]
        self._level = np.concatenate(runs) if runs else np.zeros(0, np.int64)
        self._stop = np.repeat(stops, stops - self._starts)
        self._merged = np.argsort(fakes, kind="stable")
        self._merged_below = self._below[self._merged]
        self._merged_level = _first(fakes[self._merged])

    def __call__(self, weights: Floats) -> Figures:
        """The figures of `RANKED` for weights [B, N]; NaN where a class has no weight."""
        batch = len(weights)
        each = {key: np.full((batch, self._generators), np.nan) for key in RANKED}
        if not self._present or not self.real:
            return Figures({key: np.full(batch, np.nan) for key in RANKED}, each)
        below_real = self._below_real(weights)
        real = below_real[:, -1:]
        w, below, product = self._pairs(weights, below_real)
        mass = np.add.reduceat(w, self._starts, axis=1)
        sums = {"auroc": np.add.reduceat(product, self._starts, axis=1) / np.where(real, real, np.nan)}
        false = np.subtract(real, below, out=below)
        for key, rate in RATES.items():
            # Weights are whole numbers: the slack only corrects the rounding of, say, 0.05 * 140.
            np.multiply(w, false <= rate * real + 1e-9, out=product)
            sums[key] = np.add.reduceat(product, self._starts, axis=1)
        sums["ap"] = self._precision(w, false)
        with np.errstate(invalid="ignore", divide="ignore"):
            for key in RANKED:
                each[key][:, self._present] = np.where(real > 0, sums[key] / mass, np.nan)
            overall = {key: sums[key].sum(1) / mass.sum(1) for key in RANKED if key != "ap"}
            overall["ap"] = self._merged_precision(w, below_real) / mass.sum(1)
        return Figures({key: np.where(real[:, 0] > 0, overall[key], np.nan) for key in RANKED}, each)

    def auroc(self, weights: Floats) -> Floats:
        """The AUROC of all fakes alone, [B], at a fraction of the time; NaN where a class has no weight."""
        below_real = self._below_real(weights)
        w, _, product = self._pairs(weights, below_real)
        pairs = w.sum(1) * below_real[:, -1]
        return np.divide(product.sum(1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    def _below_real(self, weights: Floats) -> Floats:
        """[B, photographs + 1]: the weight of the photographs before each, by score."""
        return self._cumulated("below real", self._taken("reals", weights, self._reals))

    def _pairs(self, weights: Floats, below_real: Floats) -> tuple[Floats, Floats, Floats]:
        """For each fake [B, fakes]: its weight, that of the photographs below it, and the pairs it wins.

        A photograph of the same score is half a pair (Hanley and McNeil 1982).
        """
        below = self._taken("below", below_real, self._below)
        w = self._taken("w", weights, self._fakes)
        product = self._space("product", w.shape)
        if self._ties:
            upto = self._taken("upto", below_real, self._upto)
            np.multiply(w, np.divide(np.add(below, upto, out=upto), 2, out=upto), out=product)
        else:
            np.multiply(w, below, out=product)
        return w, below, product

    def _precision(self, w: Floats, false: Floats) -> Floats:
        """Each generator's sum of weight times precision at its own scores, [B, present]."""
        before = self._cumulated("before", w)
        true = self._taken("true", before, self._level)
        np.subtract(before.take(self._stop, axis=1), true, out=true)
        return np.add.reduceat(self._weighted_precision(w, true, false), self._starts, axis=1)

    def _merged_precision(self, w: Floats, below_real: Floats) -> Floats:
        """The same over the fakes of all generators together, [B]."""
        w = self._taken("merged w", w, self._merged)
        before = self._cumulated("before", w)
        true = self._taken("true", before, self._merged_level)
        np.subtract(before[:, -1:], true, out=true)
        false = self._taken("below", below_real, self._merged_below)
        np.subtract(below_real[:, -1:], false, out=false)
        return self._weighted_precision(w, true, false).sum(1)

    def _weighted_precision(self, w: Floats, true: Floats, false: Floats) -> Floats:
        """Weight times precision, [B, fakes]; where nothing is detected, the weight is 0 as well."""
        total = np.add(true, false, out=self._space("product", w.shape))
        np.divide(true, np.maximum(total, _TINY, out=total), out=total)
        return np.multiply(w, total, out=total)

    # Large arrays are reused from batch to batch, by each thread: new memory doubles the time.

    def _space(self, name: str, shape: tuple[int, int]) -> Floats:
        array: Floats | None = self._kept.__dict__.get(name)
        if array is None or array.shape != shape:
            array = self._kept.__dict__[name] = np.zeros(shape)
        return array

    def _taken(self, name: str, values: Floats, columns: NDArray[np.int64]) -> Floats:
        """Columns of [B, n]."""
        # "clip" avoids a copy; no column is out of range.
        return values.take(columns, axis=1, out=self._space(name, (len(values), len(columns))), mode="clip")

    def _cumulated(self, name: str, w: Floats) -> Floats:
        """[B, n + 1]: the sum of the columns before each."""
        total = self._space(name, (len(w), w.shape[1] + 1))
        np.cumsum(w, axis=1, out=total[:, 1:])
        return total


def _first(ascending: Floats) -> NDArray[np.int64]:
    """Where the run of equal numbers begins, for each of sorted numbers [n]."""
    return np.searchsorted(ascending, ascending, side="left")


def resample(
    sample: Sample, compute: Callable[[Floats], Figures], *, resamples: int, seed: int, grouped: bool = False
) -> Figures:
    """The figures of every resample; they do not depend on the number of cores.

    Args:
        compute: from weights [B, N], in the sample's order, to figures.
        resamples: how many. seed: of the draws.
        grouped: resample groups instead of images.
    """
    batch = max(1, min(resamples, _CHUNK // max(1, len(sample))))
    counts = [min(batch, resamples - start) for start in range(0, resamples, batch)]

    def compute_batch(number: int) -> Figures:
        random = np.random.default_rng([seed, number, int(grouped)])
        return compute(sample.weights(random, counts[number], grouped=grouped))

    # NumPy releases the GIL in its loops, so threads do share the work.
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        parts = list(pool.map(compute_batch, range(len(counts))))
    return Figures(
        {key: np.concatenate([part.overall[key] for part in parts]) for key in parts[0].overall},
        {key: np.concatenate([part.each[key] for part in parts]) for key in parts[0].each},
    )


def auroc_over_groups(
    fake: Bools, scores: Floats, group: NDArray[np.int64], *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of the AUROC over resampled groups.

    Each resample weighs an image by how often its group was drawn; resamples without images of
    a class are left out.

    Args:
        fake, scores, group: [N]; groups are drawn by the order of their numbers.
    """
    random = np.random.default_rng(seed)
    groups, codes = np.unique(group, return_inverse=True)
    sample = Sample(fake.astype(np.int64), 2, np.arange(len(fake)))
    ranking, columns = Ranking(sample, scores), codes[sample.order]
    batch = max(1, min(resamples, _CHUNK // max(1, len(sample))))
    drawn = [
        ranking.auroc(_drawn(random, min(batch, resamples - start), len(groups))[:, columns])
        for start in range(0, resamples, batch)
    ]
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    return float(low), float(high)


def over_generators(each: Floats, columns: NDArray[np.int64], *, seed: int) -> Floats:
    """Means over resampled generators, [B], of values by resample and generator [B, G].

    Args:
        columns: the generators to resample, at least 2.
    """
    random = np.random.default_rng([seed, 2])
    drawn = columns[random.integers(0, len(columns), (len(each), len(columns)))]
    return np.take_along_axis(each, drawn, axis=1).mean(1)


def percentile_interval(values: Floats) -> list[float] | str:
    """The 95 % percentile interval [low, high] of a figure's resamples [B], or the reason for none."""
    defined = values[~np.isnan(values)]
    undefined = 1 - len(defined) / len(values) if len(values) else 1.0
    if undefined > _MAX_UNDEFINED:
        return f"undefined in {undefined:.0%} of the resamples"
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    # An interval of no width would claim certainty, for an AUROC of 1.0 say.
    if high - low <= 1e-12:
        return "every resample gives the same value: too few errors for a bootstrap"
    return [low, high]
