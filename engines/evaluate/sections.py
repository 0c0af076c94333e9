"""Parts of metrics.json: values by name, and the reason of each that cannot be computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, zero_one_loss

from engines.stats import scores
from engines.stats.scores import Bools, Floats

NO_IMAGES = "no images"
NO_OBJECTS = "no image with a known object"
NO_CALIBRATION = "no calibration"
# Figures that need both real and fake images.
RANKING = ("auroc", "ap", "eer", *scores.RATES)
# Figures of a probability, on any images.
PROBABILITY: Mapping[str, Callable[[Bools, Floats], float]] = {
    "ece": scores.calibration_error,
    "nll": scores.nll,
    "brier": scores.brier,
}
DETECTION = ("accuracy", "balanced_accuracy", "accuracy_real", "accuracy_fake", *RANKING, *PROBABILITY)


class Section:
    """One part of metrics.json; a value that cannot be computed leaves its reason."""

    def __init__(self, name: str, reasons: dict[str, str]) -> None:
        self.values: dict[str, Any] = {}
        self._name, self._reasons = name, reasons

    def null(self, key: str, reason: str) -> None:
        self.values[key] = None
        self._reasons[f"{self._name}.{key}"] = reason

    def nulls(self, keys: Sequence[str], reason: str) -> None:
        for key in keys:
            self.null(key, reason)

    def error(self, key: str, true: NDArray[Any], predicted: NDArray[Any], empty: str = NO_IMAGES) -> None:
        """The share of rows in which two arrays [n] differ."""
        if len(true):
            self.values[key] = float(zero_one_loss(true, predicted))
        else:
            self.null(key, empty)

    def share(self, key: str, flags: Bools, empty: str) -> None:
        """The share of flags [n] that are set."""
        if len(flags):
            self.values[key] = float(np.mean(flags))
        else:
            self.null(key, empty)

    def macro_f1(
        self, key: str, true: NDArray[np.int64], predicted: NDArray[np.int64], empty: str = NO_IMAGES
    ) -> None:
        """The mean F1 over the classes that are true or predicted somewhere; labels are int64 [n]."""
        if len(true):
            self.values[key] = float(f1_score(true, predicted, average="macro", zero_division=0.0))
        else:
            self.null(key, empty)

    def detection(self, fake: Bools, p: Floats, threshold: float, names: tuple[str, str]) -> None:
        """Every figure of `DETECTION` for telling fake [n] from real by p [n]; `names` of (fakes, reals)."""
        called = p >= threshold
        missing = [name for name, there in zip(names, (fake.any(), (~fake).any()), strict=True) if not there]
        self.share("accuracy", called == fake, NO_IMAGES)
        if missing:
            self.nulls(("balanced_accuracy", *RANKING), f"no images of {' and '.join(missing)}")
        else:
            self.values["balanced_accuracy"] = scores.balanced_accuracy(fake, called)
            self.values["auroc"] = scores.auroc(fake, p)
            self.values["ap"] = scores.average_precision(fake, p)
            self.values |= scores.operating_points(fake, p)
        self.share("accuracy_real", ~called[~fake], f"no images of {names[1]}")
        self.share("accuracy_fake", called[fake], f"no images of {names[0]}")
        self.probability(fake, p)

    def probability(self, fake: Bools, p: Floats, suffix: str = "") -> None:
        """Every figure of `PROBABILITY` of p [n], under its name and `suffix`."""
        for key, formula in PROBABILITY.items():
            if len(p):
                self.values[key + suffix] = formula(fake, p)
            else:
                self.null(key + suffix, NO_IMAGES)
