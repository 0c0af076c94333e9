"""The frozen decision of a calibrated checkpoint, as a predictions table carries it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataio.core.errors import UserError
from engines.evaluate.predictions import checkpoint_info
from engines.stats.scores import calibrated_probability


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How P(fake) becomes a verdict; all thresholds are on the calibrated probability.

    Attributes:
        temperature, shift: calibrated P = sigmoid((logit(P) + shift) / temperature).
        threshold: an image is called fake from here on.
        unsure: (low, high); the detector abstains where low <= calibrated P < high.
        false_alarm_rate: what the threshold was chosen for, as a fraction.
    """

    temperature: float
    shift: float
    threshold: float
    unsure: tuple[float, float]
    false_alarm_rate: float

    def probability(self, p_fake: NDArray[np.float64]) -> NDArray[np.float64]:
        """The calibrated P(fake), float64 [N], of a raw one [N], which is kept CLIP from 0 and 1."""
        return calibrated_probability(p_fake, self.temperature, self.shift)

    def calls_fake(self, p: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which calibrated probabilities [N] are called fake when nothing is left undecided."""
        return p >= self.threshold

    def abstains(self, p: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which calibrated probabilities [N] are left undecided."""
        low, high = self.unsure
        return (low <= p) & (p < high)


def decision_of(table: pa.Table) -> Decision | None:
    """The decision that was frozen for what predicted `table`; None without a calibration.

    Raises:
        UserError: the table's calibration lacks a value or holds one that is none.
    """
    stored = checkpoint_info(table).get("calibration")
    if stored is None:
        return None
    try:
        return _decision(stored)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"predictions: the calibration of their checkpoint is damaged ({' '.join(what.split())}); "
            "calibrate the checkpoint and evaluate again"
        ) from None


def _decision(stored: Mapping[str, Any]) -> Decision:
    low, high = (float(value) for value in stored["unsure"])
    names = ("temperature", "shift", "threshold", "false_alarm_rate")
    values = {name: float(stored[name]) for name in names}
    if not all(map(math.isfinite, (*values.values(), low, high))):
        raise ValueError("not all of its numbers are finite")
    if values["temperature"] <= 0:
        raise ValueError(f"its temperature is {values['temperature']}, expected more than 0")
    return Decision(**values, unsure=(low, high))
