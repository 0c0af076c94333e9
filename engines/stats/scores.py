"""Figures of a detector from truth and P(fake): pure formulas.

fake is bool [N], the positive class; p is its probability, float64 [N]. Formulas are
scikit-learn's where it has them. An image is called fake where p is at least a threshold. The
caller makes sure that the classes a figure needs are present.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score, roc_curve

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

_BINS = 15  # of the expected calibration error
RATES = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_5": 0.05}
CLIP = 1e-12  # probabilities are kept this far from 0 and 1 before a logarithm


def auroc(fake: Bools, p: Floats) -> float:
    """The area under the ROC curve; both classes must be present."""
    return float(roc_auc_score(fake, p))


def average_precision(fake: Bools, p: Floats) -> float:
    """The step-wise sum, not interpolated; both classes must be present."""
    # The sum can round to a little above 1.
    return min(1.0, float(average_precision_score(fake, p)))


def operating_points(fake: Bools, p: Floats) -> dict[str, float]:
    """Figures of single points of the ROC curve; both classes must be present.

    Returns:
        eer, where the false-alarm rate equals the miss rate, interpolated linearly between
        thresholds; tpr_at_fpr_1 and tpr_at_fpr_5, the largest detection rate of any threshold
        with a false-alarm rate of at most 1 % and 5 %.
    """
    false_alarms, detected, _ = roc_curve(fake, p, drop_intermediate=False)
    # Strictly increasing from -1 to 1: each threshold adds a false alarm or a detection.
    points = {"eer": float(np.interp(0.0, false_alarms - (1 - detected), false_alarms))}
    for key, rate in RATES.items():
        points[key] = float(detected[false_alarms <= rate].max())
    return points


def balanced_accuracy(fake: Bools, called_fake: Bools) -> float:
    """The mean of the accuracies on real and on fake; both classes must be present."""
    return float((np.mean(called_fake[fake]) + np.mean(~called_fake[~fake])) / 2)


def calibration_error(fake: Bools, p: Floats) -> float:
    """ECE of P(fake): 15 bins of equal width, closed on the left (the last on both sides).

    The mean over bins, weighted by their images, of |mean P(fake) - share of fakes|
    (Naeini et al. 2015, for the positive class; as torchmetrics' `binary_calibration_error`).
    """
    bins = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], p, side="right")
    gaps = np.bincount(bins, weights=p - fake, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(p))


def image_nll(fake: Bools, p: Floats) -> Floats:
    """Each image's negative log-likelihood in nats, float64 [N], with p kept CLIP from 0 and 1."""
    clipped = np.clip(p, CLIP, 1 - CLIP)
    return -np.log(np.where(fake, clipped, 1 - clipped))


def nll(fake: Bools, p: Floats) -> float:
    """The mean negative log-likelihood in nats (`log_loss`), with p kept CLIP from 0 and 1."""
    return float(log_loss(fake, np.clip(p, CLIP, 1 - CLIP), labels=[False, True]))


def brier(fake: Bools, p: Floats) -> float:
    """The Brier score: the mean squared difference between P(fake) and the truth, 0 or 1."""
    return float(np.mean((p - fake) ** 2))


def best_threshold(fake: Bools, p: Floats) -> dict[str, Any]:
    """The accuracy of the best threshold for these very images: an upper bound.

    Returns:
        accuracy, its threshold (the highest of the best), and the best balanced accuracy.
    """
    false_alarms, detected, thresholds = roc_curve(fake, p, drop_intermediate=False)
    right = detected * fake.sum() + (1 - false_alarms) * (~fake).sum()
    best = int(np.argmax(right))
    # The curve starts at infinity, where nothing is called fake; JSON has no infinity.
    threshold = float(np.nextafter(p.max(), 2.0)) if best == 0 else float(thresholds[best])
    return {
        "accuracy": float(right[best] / len(fake)),
        "threshold": threshold,
        "balanced_accuracy": float((detected + 1 - false_alarms).max() / 2),
    }


def calibrated_probability(p_fake: Floats, temperature: float, shift: float) -> Floats:
    """sigmoid((logit(P) + shift) / temperature), float64 [N], of P(fake) [N] kept CLIP from 0 and 1."""
    return expit((logit(np.clip(p_fake, CLIP, 1 - CLIP)) + shift) / temperature)
