"""Each formula against scikit-learn, torchmetrics or SciPy, on random and on degenerate scores."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, log_loss, roc_curve
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_eer,
    binary_sensitivity_at_specificity,
)

from engines.stats import scores


def _scores(count: int, seed: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Both classes and scores that tell them apart somewhat; `levels` makes many equal ones."""
    random = np.random.default_rng(seed)
    fake = random.random(count) < random.uniform(0.2, 0.8)
    fake[:2] = [True, False]
    p = 1 / (1 + np.exp(-random.normal(size=count) * 2 - 2 * fake + 1))
    return fake, np.round(p * levels) / levels if levels else p


# Every score alike, perfect, perfectly wrong, two images.
DEGENERATE = [
    (np.array([1, 0, 1, 0], bool), np.full(4, 0.5)),
    (np.array([1, 0, 1, 0], bool), np.array([1.0, 0.0, 1.0, 0.0])),
    (np.array([1, 0, 1, 0], bool), np.array([0.0, 1.0, 0.0, 1.0])),
    (np.array([1, 0], bool), np.array([0.3, 0.2])),
    (np.array([1, 0, 0], bool), np.array([0.3, 0.3, 0.9])),
]
CASES = [_scores(400, 1), _scores(401, 2, levels=7), _scores(60, 3, levels=3), *DEGENERATE]


@pytest.mark.parametrize(("fake", "p"), CASES)
def test_formulas_equal_other_libraries(fake: np.ndarray, p: np.ndarray) -> None:
    preds, target = torch.from_numpy(p), torch.from_numpy(fake.astype(int))
    assert scores.auroc(fake, p) == pytest.approx(binary_auroc(preds, target).item(), abs=1e-6)
    assert scores.average_precision(fake, p) == pytest.approx(
        binary_average_precision(preds, target).item(), abs=1e-6
    )
    ece = binary_calibration_error(preds, target, n_bins=15, norm="l1").item()
    assert scores.calibration_error(fake, p) == pytest.approx(ece, abs=1e-6)
    assert scores.brier(fake, p) == pytest.approx(brier_score_loss(fake, p), abs=1e-12)
    clipped = np.clip(p, 1e-12, 1 - 1e-12)
    assert scores.nll(fake, p) == pytest.approx(log_loss(fake, clipped, labels=[0, 1]), abs=1e-12)
    assert scores.image_nll(fake, p).mean() == pytest.approx(scores.nll(fake, p), rel=1e-9)
    called = p >= 0.5
    assert scores.balanced_accuracy(fake, called) == pytest.approx(balanced_accuracy_score(fake, called))
    points = scores.operating_points(fake, p)
    for key, rate in (("tpr_at_fpr_1", 0.01), ("tpr_at_fpr_5", 0.05)):
        sensitivity, _ = binary_sensitivity_at_specificity(preds, target, min_specificity=1 - rate)
        assert points[key] == pytest.approx(sensitivity.item(), abs=1e-6)


@pytest.mark.parametrize(("fake", "p"), CASES)
def test_equal_error_rate_is_where_the_roc_curve_meets_the_diagonal(fake: np.ndarray, p: np.ndarray) -> None:
    false_alarms, detected, _ = roc_curve(fake, p, drop_intermediate=False)
    # As the well-known recipe has it, by root finding on the curve. A curve with a vertical piece
    # is a function only of its length.
    along = np.linspace(0, 1, len(false_alarms))
    x, y = interp1d(along, false_alarms), interp1d(along, detected)
    root = brentq(lambda t: 1 - x(t) - y(t), 0.0, 1.0)
    found = scores.operating_points(fake, p)["eer"]
    assert found == pytest.approx(float(x(root)), abs=1e-9)
    # torchmetrics takes the threshold that comes nearest.
    gap = max(np.diff(false_alarms).max(), np.diff(detected).max())
    nearest = binary_eer(torch.from_numpy(p), torch.from_numpy(fake.astype(int))).item()
    assert abs(found - nearest) <= gap / 2 + 1e-6


def test_equal_error_rate_of_known_curves() -> None:
    fake = np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
    mixed = np.array([0.1, 0.2, 0.3, 0.8, 0.4, 0.7, 0.9, 0.95])
    assert scores.operating_points(fake, mixed)["eer"] == 0.25
    assert scores.operating_points(fake, fake.astype(float))["eer"] == 0.0
    assert scores.operating_points(fake, 1.0 - fake)["eer"] == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000), st.sampled_from([0, 2, 15]))
def test_calibration_error_is_that_of_a_plain_count(count: int, seed: int, levels: int) -> None:
    fake, p = _scores(count, seed, levels)
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        rows = (low <= p) & ((p < high) | ((high == 1) & (p == 1)))
        if rows.any():
            total += rows.sum() * abs(p[rows].mean() - fake[rows].mean())
    assert scores.calibration_error(fake, p) == pytest.approx(total / count, abs=1e-12)


def test_certain_and_wrong_has_a_finite_loss() -> None:
    assert scores.nll(np.array([True]), np.array([0.0])) == pytest.approx(-np.log(1e-12))
    assert scores.nll(np.array([False]), np.array([1.0])) == pytest.approx(-np.log(1e-12), rel=1e-4)


@pytest.mark.parametrize(("fake", "p"), CASES)
def test_best_threshold_is_the_best_of_all(fake: np.ndarray, p: np.ndarray) -> None:
    best = scores.best_threshold(fake, p)
    tried = [*np.unique(p), 2.0]
    accuracies = [np.mean((p >= t) == fake) for t in tried]
    assert best["accuracy"] == pytest.approx(max(accuracies))
    assert np.mean((p >= best["threshold"]) == fake) == pytest.approx(best["accuracy"])
    assert best["balanced_accuracy"] == pytest.approx(
        max((np.mean(p[fake] >= t) + np.mean(p[~fake] < t)) / 2 for t in tried)
    )
    assert np.isfinite(best["threshold"])
