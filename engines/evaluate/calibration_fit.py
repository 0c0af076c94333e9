"""Fitting a calibration: temperature and shift by maximum likelihood, then the two thresholds."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from dataio.core.errors import UserError
from engines.evaluate.calibration import Calibration
from engines.stats.scores import CLIP, calibrated_probability

TEMPERATURES = (0.05, 20.0)  # bounds of the fit


def _logit(p_fake: ArrayLike) -> NDArray[np.float64]:
    return logit(np.clip(np.asarray(p_fake, np.float64), CLIP, 1 - CLIP))


def fit_calibration(
    p_fake: ArrayLike,
    fake: ArrayLike,
    *,
    false_alarm_rate: float = 0.01,
    miss_rate: float = 0.05,
    split: str,
    weights_sha256: str,
) -> Calibration:
    """Fit temperature and shift, then choose the thresholds.

    The threshold calls at most `false_alarm_rate` of the photographs AI-generated; the lower
    end of the unsure band calls at most `miss_rate` of the fakes real.

    Args:
        p_fake: float [N], raw. fake: bool [N], False for photographs.
        false_alarm_rate: in (0, 1). miss_rate: in [0, 1]; 1 leaves no band.
        split, weights_sha256: stored in the calibration.

    Raises:
        UserError: there are no fakes or no photographs, or a P(fake) is outside [0, 1].
    """
    p, truth = np.asarray(p_fake, np.float64), np.asarray(fake, bool)
    bad = ~((p >= 0) & (p <= 1))
    if bad.any():
        raise UserError(
            f"{split} split: P(fake) of image {int(np.argmax(bad))} is {p[bad][0]:.4g}, expected a number in "
            "[0, 1]; did the training diverge?"
        )
    reals, fakes = int((~truth).sum()), int(truth.sum())
    if not reals or not fakes:
        raise UserError(
            f"{split} split: holds {reals} real and {fakes} generated images, and a calibration needs both; "
            "choose other data or another split"
        )
    temperature, shift, notes = _fit_logits(_logit(p), truth)
    calibrated = calibrated_probability(p, temperature, shift)
    threshold = false_alarm_threshold(calibrated, truth, false_alarm_rate)
    low = min(miss_threshold(calibrated, truth, miss_rate), threshold)
    if false_alarm_rate * reals < 1:
        notes.append(
            f"a false-alarm rate of {false_alarm_rate:g} takes at least {math.ceil(1 / false_alarm_rate)} real "
            f"images and the {split} split has {reals}: the threshold lies above them all, and the rate on "
            "other images may be higher"
        )
    if threshold > 1:
        notes.append("photographs have the highest P(fake) of all: no image will be called AI-generated")
    unsure = (calibrated >= low) & (calibrated < threshold)
    return Calibration(
        temperature=temperature,
        shift=shift,
        threshold=threshold,
        unsure=(low, threshold),
        false_alarm_rate=false_alarm_rate,
        miss_rate=miss_rate,
        split=split,
        weights_sha256=weights_sha256,
        counts={
            "real": reals,
            "fake": fakes,
            "false_alarms": int((calibrated[~truth] >= threshold).sum()),
            "misses": int((calibrated[truth] < low).sum()),
            "unsure_real": int((unsure & ~truth).sum()),
            "unsure_fake": int((unsure & truth).sum()),
        },
        before=_quality(p, truth),
        after=_quality(calibrated, truth),
        notes=tuple(notes),
    )


def _fit_logits(z: NDArray[np.float64], fake: NDArray[np.bool_]) -> tuple[float, float, list[str]]:
    """The temperature and shift with the lowest mean NLL, and notes; z float64 [N].

    With a = 1 / temperature and b = shift / temperature the NLL of sigmoid(a z + b) is
    convex, so any descent finds its minimum. scikit-learn's LogisticRegression has neither
    bounds nor targets other than 0 and 1.
    """
    target, notes = fake.astype(np.float64), []
    if z[fake].min() > z[~fake].max():
        # The NLL has no minimum here: it keeps falling with the temperature.
        notes.append("the split is separated without an error: Platt's targets replace 0 and 1")
        target = np.where(fake, (fake.sum() + 1) / (fake.sum() + 2), 1 / ((~fake).sum() + 2))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = parameters[0] * z + parameters[1]
        value = np.mean(np.logaddexp(0, margin) - target * margin)
        slope = expit(margin) - target
        return float(value), np.array([np.mean(slope * z), np.mean(slope)])

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    result = minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high), (None, None)],
        options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10},
    )
    a, b = (float(value) for value in result.x)
    if a <= low:
        notes.append(
            f"the temperature is at its bound of {TEMPERATURES[1]:g}: the detector does not separate this "
            "split's fakes from its photographs"
        )
    elif a >= high:
        notes.append(f"the temperature is at its bound of {TEMPERATURES[0]:g}")
    return 1 / a, b / a, notes


def _quality(p: NDArray[np.float64], fake: NDArray[np.bool_]) -> dict[str, float]:
    import torch
    from sklearn.metrics import log_loss
    from torchmetrics.functional.classification import binary_calibration_error

    ece = binary_calibration_error(torch.tensor(p), torch.tensor(fake.astype(np.int64)), n_bins=15)
    return {"nll": float(log_loss(fake, np.clip(p, CLIP, 1 - CLIP), labels=[0, 1])), "ece": float(ece)}


def false_alarm_threshold(p: NDArray[np.float64], fake: NDArray[np.bool_], rate: float) -> float:
    """The smallest threshold t such that at most `rate` of the photographs have p >= t.

    All t between two neighboring scores decide alike on these images. The result is the
    middle of the lowest such interval, so that the last digit of a score decides nothing.

    Args:
        p: float64 [N]. fake: bool [N], with at least one photograph.
    """
    reals = np.sort(p[~fake])[::-1]
    allowed = int(rate * len(reals) + 1e-9)
    if allowed >= len(reals):
        return 0.0
    last = float(reals[allowed])  # the highest score that must not be called AI-generated
    above = p[p > last]
    return _between(last, float(above.min()) if len(above) else last)


def miss_threshold(p: NDArray[np.float64], fake: NDArray[np.bool_], rate: float) -> float:
    """The largest threshold t such that at most `rate` of the fakes have p < t; see `false_alarm_threshold`."""
    fakes = np.sort(p[fake])
    allowed = int(rate * len(fakes) + 1e-9)
    if allowed >= len(fakes):
        return 1.0
    first = float(fakes[allowed])  # the lowest score that must not be called real
    below = p[p < first]
    return _between(float(below.max()), first) if len(below) else first


def _between(low: float, high: float) -> float:
    """The middle of (low, high]; just above `low` where that interval is empty."""
    middle = (low + high) / 2
    return middle if low < middle <= high else math.nextafter(low, 2.0)
