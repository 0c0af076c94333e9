"""Probabilities that mean what they say, and a frozen decision: fitted on val, kept beside the checkpoint.

The calibrated probability is sigmoid((logit(P(fake)) + shift) / temperature): temperature
scaling (Guo et al., "On calibration of modern neural networks", 2017) with a shift of the
logit, which is Platt's scaling (Platt, "Probabilistic outputs for support vector machines",
1999) in other words. The decision has two thresholds on it:

* p >= threshold is called AI-generated; at most `false_alarm_rate` of val's photographs are.
* p < unsure[0] is called real; at most `miss_rate` of val's fakes are.
* what lies between is called unsure. The band is empty where the second threshold is not
  below the first; then the first alone decides.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, reason_of
from engines.checkpoint.files import locate, weights_sha256
from engines.stats.scores import CLIP, calibrated_probability

FORMAT, VERSION = "telltale-calibration", 1
Verdict = Literal["real", "AI-generated", "unsure"]
TEMPERATURES = (0.05, 20.0)  # within which the fit looks


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a checkpoint's P(fake) becomes a probability and a verdict.

    Attributes:
        temperature, shift: of the logit of P(fake).
        threshold: on the calibrated probability; from there on an image is AI-generated.
        unsure: (low, high) with high = threshold; low <= p < high is unsure.
        false_alarm_rate, miss_rate: what the two thresholds were chosen for, as fractions.
        split: what it was fitted on. weights_sha256: of the weights it belongs to.
        counts: of the split: real, fake, false_alarms, misses, unsure_real, unsure_fake.
        before, after: nll (nats per image) and ece (15 bins) of the split.
        notes: what its user should know, a line each.
    """

    temperature: float
    shift: float
    threshold: float
    unsure: tuple[float, float]
    false_alarm_rate: float
    miss_rate: float
    split: str
    weights_sha256: str
    counts: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.shift, self.threshold, *self.unsure)
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(
                f"temperature, shift, threshold and unsure are {numbers}, expected finite numbers"
            )
        if self.temperature <= 0 or len(self.unsure) != 2 or not 0 <= self.unsure[0] <= self.unsure[1]:
            raise ValueError("expected temperature > 0 and unsure as [low, high], 0 <= low <= high")
        if self.unsure[1] != self.threshold:
            raise ValueError(f"unsure ends at {self.unsure[1]}, expected the threshold {self.threshold}")

    def probability(self, p_fake: ArrayLike) -> NDArray[np.float64]:
        """The calibrated P(fake), float64 of the same shape as `p_fake`."""
        return calibrated_probability(np.asarray(p_fake, np.float64), self.temperature, self.shift)

    def verdict(self, p: float) -> Verdict:
        """What a calibrated probability is called."""
        if p >= self.threshold:
            return "AI-generated"
        return "unsure" if p >= self.unsure[0] else "real"

    def summary(self) -> dict[str, Any]:
        """What a predictions table keeps of it, to decide as `verdict` does."""
        return {
            "temperature": self.temperature,
            "shift": self.shift,
            "threshold": self.threshold,
            "unsure": list(self.unsure),
            "false_alarm_rate": self.false_alarm_rate,
        }

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {"format": FORMAT, "version": VERSION, **values, "unsure": list(self.unsure)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` gives.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        values = dict(values)
        if values.pop("format") != FORMAT:
            raise ValueError(f"no {FORMAT}")
        version = values.pop("version")
        if version != VERSION:
            raise ValueError(f"version {version}, this telltale reads {VERSION}")
        return cls(**{**values, "unsure": tuple(values["unsure"]), "notes": tuple(values.get("notes", ()))})


def uncalibrated_verdict(p: float) -> Verdict:
    """What a raw P(fake) is called where there is no calibration."""
    return "AI-generated" if p >= 0.5 else "real"


def _logit(p_fake: ArrayLike) -> NDArray[np.float64]:
    return logit(np.clip(np.asarray(p_fake, np.float64), CLIP, 1 - CLIP))


def fit(
    p_fake: ArrayLike,
    fake: ArrayLike,
    *,
    false_alarm_rate: float = 0.01,
    miss_rate: float = 0.05,
    split: str,
    weights_sha256: str,
) -> Calibration:
    """Fit temperature and shift, then freeze the thresholds.

    Args:
        p_fake: [N], raw. fake: [N], whether each image is none of nature's.
        false_alarm_rate: in (0, 1). miss_rate: in [0, 1]; 1 leaves no band.

    Raises:
        UserError: no fakes, no photographs, or a P(fake) that is no probability.
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
            f"{split} split: holds {reals} real and {fakes} generated images, and a calibration takes both; "
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
        notes.append("photographs have the highest P(fake) there is: no image will be called AI-generated")
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
    """Temperature and shift of the least mean NLL; z float64 [N].

    With a = 1 / temperature and b = shift / temperature the NLL of sigmoid(a z + b) is
    convex, so any descent finds its minimum.
    """
    target, notes = fake.astype(np.float64), []
    if z[fake].min() > z[~fake].max():
        # The NLL has no minimum here: ever lower temperatures are ever better.
        notes.append("the split is told apart without an error: Platt's targets take the place of 0 and 1")
        target = np.where(fake, (fake.sum() + 1) / (fake.sum() + 2), 1 / ((~fake).sum() + 2))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = parameters[0] * z + parameters[1]
        value = np.mean(np.logaddexp(0, margin) - target * margin)
        slope = expit(margin) - target
        return float(value), np.array([np.mean(slope * z), np.mean(slope)])

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    found = minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high), (None, None)],
        options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10},
    )
    a, b = (float(value) for value in found.x)
    if a <= low:
        notes.append(
            f"the temperature is at its bound of {TEMPERATURES[1]:g}: the detector does not tell this split's "
            "fakes from its photographs"
        )
    elif a >= high:
        notes.append(f"the temperature is at its bound of {TEMPERATURES[0]:g}")
    return 1 / a, b / a, notes


def _quality(p: NDArray[np.float64], fake: NDArray[np.bool_]) -> dict[str, float]:
    from sklearn.metrics import log_loss
    from torchmetrics.functional.classification import binary_calibration_error

    ece = binary_calibration_error(torch.tensor(p), torch.tensor(fake.astype(np.int64)), n_bins=15)
    return {"nll": float(log_loss(fake, np.clip(p, CLIP, 1 - CLIP), labels=[0, 1])), "ece": float(ece)}


def false_alarm_threshold(p: NDArray[np.float64], fake: NDArray[np.bool_], rate: float) -> float:
    """The smallest threshold t such that at most `rate` of the photographs have p >= t.

    All t between two neighbouring scores decide alike on these images; of the lowest such
    interval the middle is taken, so that the last digit of a score decides nothing.

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
    """The largest threshold t such that at most `rate` of the fakes have p < t; as above."""
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


def calibration_path(checkpoint: str | Path) -> Path:
    """Where a checkpoint's calibration lies: RUN/best.calibration.json beside RUN/best.pt.

    An export's is model.calibration.json, inside of its folder.
    """
    path = locate(checkpoint)
    return path / "model.calibration.json" if path.is_dir() else path.with_suffix(".calibration.json")


def save_calibration(checkpoint: str | Path, calibration: Calibration) -> Path:
    """Write it beside the checkpoint, atomically; an earlier one is replaced.

    Raises:
        UserError: it cannot be written.
    """
    path = calibration_path(checkpoint)
    try:
        write_text(path, json.dumps(calibration.to_dict(), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason_of(error)}); make its folder writable") from None
    return path


def load_calibration(
    checkpoint: str | Path, weights: Mapping[str, torch.Tensor] | None = None
) -> Calibration | None:
    """The calibration beside a checkpoint; None where there is none.

    One of other weights is an error and no warning: to fall back to raw probabilities
    would change the verdicts of the same command without its user noticing.

    Args:
        weights: the state of the model that the checkpoint holds; None reads it.

    Raises:
        UserError: not a calibration, or one of other weights.
    """
    path = calibration_path(checkpoint)
    try:
        found = Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(f"{path}: not a calibration ({reason}); {_again(checkpoint)}") from None
    if weights is None:
        from engines.evaluate.split_inference import load_model

        weights = load_model(checkpoint)[0].state_dict()
    if found.weights_sha256 != weights_sha256(weights):
        raise UserError(f"{path}: belongs to other weights than {checkpoint} now holds; {_again(checkpoint)}")
    return found


def _again(checkpoint: str | Path) -> str:
    return f"run `python launch/calibrate.py --checkpoint {checkpoint}` again, or delete the file"
