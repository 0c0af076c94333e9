"""The bootstrap: figures from weights, the resamples themselves, and how often intervals hold the truth."""

import os
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from engines.stats.bootstrap import (
    RANKED,
    Figures,
    Ranking,
    Sample,
    Shares,
    over_generators,
    percentile_interval,
    resample,
)
from engines.stats.scores import operating_points


def _images(count: int, seed: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    generator = random.integers(0, 4, count)
    p = 1 / (1 + np.exp(-random.normal(size=count) - 1.5 * (generator > 0)))
    return generator, np.round(p * levels) / levels if levels else p


@pytest.mark.parametrize("levels", [0, 5])
@pytest.mark.parametrize("grouped", [False, True])
def test_figures_of_weights_are_those_of_repeated_images(levels: int, grouped: bool) -> None:
    """The oracle copies each image as often as it was drawn and asks scikit-learn."""
    generator, p = _images(150, 1, levels)
    ids = np.random.default_rng(2).permutation(150)
    sample = Sample(generator, 5, ids, cluster=ids // 3)
    wrong, counted = (p >= 0.5) != (generator > 0), ids % 2 == 0
    ranking, shares = Ranking(sample, p), Shares(sample, {"all": (wrong, None), "some": (wrong, counted)})
    weights = sample.weights(np.random.default_rng(3), 6, grouped=grouped)
    found, (values, counts) = ranking(weights), shares.sums(weights)
    for row, weight in enumerate(weights.astype(int)):
        rows = np.repeat(sample.order, weight)
        fake, score = generator[rows] > 0, p[rows]
        assert found.overall["auroc"][row] == pytest.approx(roc_auc_score(fake, score), abs=1e-12)
        assert found.overall["ap"][row] == pytest.approx(average_precision_score(fake, score), abs=1e-12)
        assert found.overall["tpr_at_fpr_5"][row] == pytest.approx(
            operating_points(fake, score)["tpr_at_fpr_5"], abs=1e-12
        )
        for index in range(4):
            own = rows[generator[rows] == index]
            assert counts["all"][row, index] == len(own)
            assert values["all"][row, index] == wrong[own].sum()
            assert counts["some"][row, index] == counted[own].sum()
            assert values["some"][row, index] == (wrong & counted)[own].sum()
            if index == 0:
                continue
            both = rows[np.isin(generator[rows], [0, index])]
            fake, score = generator[both] > 0, p[both]
            assert found.each["auroc"][row, index] == pytest.approx(roc_auc_score(fake, score), abs=1e-12)
            ap = average_precision_score(fake, score)
            assert found.each["ap"][row, index] == pytest.approx(ap, abs=1e-12)
            tpr = operating_points(fake, score)["tpr_at_fpr_1"]
            assert found.each["tpr_at_fpr_1"][row, index] == pytest.approx(tpr, abs=1e-12)
    # A generator without images, and nature against itself.
    assert all(np.isnan(found.each[key][:, [0, 4]]).all() for key in RANKED)


def test_images_are_drawn_within_their_generator_and_groups_whole() -> None:
    generator, _ = _images(90, 4)
    ids = np.random.default_rng(5).permutation(90)
    sample = Sample(generator, 4, ids, cluster=ids // 2)
    weights = sample.weights(np.random.default_rng(0), 50)
    for index, block in sample.blocks():
        assert (weights[:, block].sum(1) == (generator == index).sum()).all()
    assert weights.std() == pytest.approx(1, abs=0.05)
    weights = sample.weights(np.random.default_rng(0), 50, grouped=True)
    assert (weights.sum(1) == 90).all()
    by_id = np.empty_like(weights)
    by_id[:, ids[sample.order]] = weights
    assert (by_id[:, ::2] == by_id[:, 1::2]).all()


def _auroc(sample: Sample, p: np.ndarray, **options: Any) -> np.ndarray:
    return resample(sample, Ranking(sample, p), **options).overall["auroc"]


def test_seed_and_nothing_else_decides() -> None:
    generator, p = _images(80, 6)
    ids = np.arange(80)
    first = _auroc(Sample(generator, 4, ids), p, resamples=300, seed=1)
    assert np.array_equal(first, _auroc(Sample(generator, 4, ids), p, resamples=300, seed=1))
    assert not np.array_equal(first, _auroc(Sample(generator, 4, ids), p, resamples=300, seed=2))
    order = np.random.default_rng(0).permutation(80)
    for cluster in (None, ids // 2):
        straight = Sample(generator, 4, ids, cluster)
        shuffled = Sample(generator[order], 4, ids[order], None if cluster is None else 7 - cluster[order])
        options = {"resamples": 50, "seed": 1, "grouped": cluster is not None}
        assert np.array_equal(_auroc(straight, p, **options), _auroc(shuffled, p[order], **options))


def test_one_core_gives_what_several_do() -> None:
    generator, p = _images(3000, 7)
    sample, cores = Sample(generator, 4, np.arange(3000)), os.sched_getaffinity(0)
    several = _auroc(sample, p, resamples=200, seed=0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert np.array_equal(several, _auroc(sample, p, resamples=200, seed=0))
    finally:
        os.sched_setaffinity(0, cores)


def test_spread_is_that_of_the_binomial() -> None:
    """What a share's bootstrap has to be, in closed form."""
    wrong = np.arange(400) < 40
    sample = Sample(np.ones(400, np.int64), 2, np.arange(400))
    shares = Shares(sample, {"wrong": (wrong, None)})
    drawn = resample(
        sample, lambda w: Figures({"e": shares.sums(w)[0]["wrong"][:, 1] / 400}, {}), resamples=4000, seed=0
    )
    assert drawn.overall["e"].mean() == pytest.approx(0.1, abs=0.001)
    assert drawn.overall["e"].std() == pytest.approx(np.sqrt(0.1 * 0.9 / 400), rel=0.04)


def test_undefined_and_constant_figures_have_a_reason_and_no_interval() -> None:
    assert percentile_interval(np.full(10, np.nan)) == "undefined in 100% of the resamples"
    assert "undefined in 20%" in str(percentile_interval(np.r_[np.full(2, np.nan), np.arange(8.0)]))
    assert "too few errors" in str(percentile_interval(np.ones(10)))
    assert percentile_interval(np.arange(1001.0)) == pytest.approx([25, 975])


def test_means_over_generators_vary_with_the_generators() -> None:
    each = np.tile([np.nan, 0.2, 0.4, 0.9], (4000, 1))
    means = over_generators(each, np.array([1, 2, 3]), seed=0)
    assert means.min() == pytest.approx(0.2) and means.max() == pytest.approx(0.9)
    assert means.mean() == pytest.approx(0.5, abs=0.01)
    assert means.std() == pytest.approx(np.std([0.2, 0.4, 0.9]) / np.sqrt(3), rel=0.05)


def _holds(values: np.ndarray, truth: float) -> bool:
    found = percentile_interval(values)
    return not isinstance(found, str) and found[0] <= truth <= found[1]


def test_coverage_over_images_is_95_per_cent() -> None:
    """Two normal distributions, 800 test sets of 2 x 150 images: AUROC, AP's ranks and the error."""
    random = np.random.default_rng(0)
    generator = np.repeat([0, 1], 150)
    truth_auroc, truth_error = norm.cdf(1.5 / np.sqrt(2)), norm.cdf(-0.75)
    held = np.zeros((800, 2), bool)
    for trial in range(800):
        x = random.normal(size=300) + 1.5 * generator
        sample = Sample(generator, 2, np.arange(300))
        ranking, shares = Ranking(sample, x), Shares(sample, {"e": ((x >= 0.75) != generator, None)})

        def compute(w: np.ndarray, ranking: Ranking = ranking, shares: Shares = shares) -> Figures:
            error = shares.sums(w)[0]["e"].sum(1) / 300
            return Figures({"auroc": ranking(w).overall["auroc"], "error": error}, {})

        drawn = resample(sample, compute, resamples=400, seed=trial).overall
        held[trial] = _holds(drawn["auroc"], truth_auroc), _holds(drawn["error"], truth_error)
    assert (held.mean(0) >= 0.93).all() and (held.mean(0) <= 0.97).all(), held.mean(0)


def test_coverage_over_groups_is_95_per_cent_where_that_over_images_is_not() -> None:
    """600 test sets of 100 groups of 4 images, which share much of their score and both classes."""
    random = np.random.default_rng(1)
    generator = np.tile([0, 0, 1, 1], 100)
    group = np.repeat(np.arange(100), 4)
    # Wrong is what lies on the other side of the middle.
    truth = norm.cdf(-0.5)
    held = np.zeros((600, 2), bool)
    for trial in range(600):
        x = np.sqrt(0.8) * random.normal(size=100)[group] + np.sqrt(0.2) * random.normal(size=400)
        sample = Sample(generator, 2, np.arange(400), group)
        shares = Shares(sample, {"e": (x < -0.5, None)})

        def compute(w: np.ndarray, shares: Shares = shares) -> Figures:
            values, counts = shares.sums(w)
            return Figures({"error": values["e"].sum(1) / counts["e"].sum(1)}, {})

        for column, grouped in enumerate((True, False)):
            drawn = resample(sample, compute, resamples=400, seed=trial, grouped=grouped)
            held[trial, column] = _holds(drawn.overall["error"], truth)
    over_groups, over_images = held.mean(0)
    assert 0.93 <= over_groups <= 0.97, over_groups
    assert over_images < 0.85, over_images
