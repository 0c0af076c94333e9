"""Calibrated probabilities and a frozen decision, stored beside the checkpoint they belong to.

The calibrated probability is sigmoid((logit(P(fake)) + shift) / temperature): temperature
scaling (Guo et al., "On calibration of modern neural networks", 2017) with a shift of the
logit, which is equivalent to Platt scaling (Platt, "Probabilistic outputs for support vector
machines", 1999). The decision has two thresholds on it:

* p >= threshold: AI-generated;
* p < unsure[0]: real;
* in between: unsure. The band is empty where the second threshold is not below the first;
  the first then decides alone.

`engines.evaluate.calibration_fit` fits all of it on validation images.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, one_line, writing
from dataio.core.versioned_json import read_versioned_json
from engines.evaluate.predictions import checkpoint_info
from engines.stats.scores import calibrated_probability

if TYPE_CHECKING:  # comparing two tables needs no torch
    import torch

FORMAT, VERSION = "telltale-calibration", 1
Verdict = Literal["real", "AI-generated", "unsure"]
_SUMMARY = ("temperature", "shift", "threshold", "unsure", "false_alarm_rate")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Maps a checkpoint's P(fake) to a calibrated probability and a verdict.

    A predictions table stores the first five values only (`summary`); the others then have
    their defaults.

    Attributes:
        temperature, shift: of the logit of P(fake).
        threshold: on the calibrated probability; an image is AI-generated from there on.
        unsure: (low, high) with high = threshold; low <= p < high is unsure.
        false_alarm_rate, miss_rate: the rates that the two thresholds were chosen for, as
            fractions.
        split: the split it was fitted on. weights_sha256: of the weights it belongs to.
        counts: on that split: real, fake, false_alarms, misses, unsure_real, unsure_fake.
        before, after: nll (nats per image) and ece (15 bins) on that split.
        data: the shards it was fitted on, see `engines.checkpoint.contract.check_shards`; empty in
            older files.
        notes: warnings for the user, one line each.

    Raises:
        ValueError: a number is not finite, the temperature is not positive, or `unsure` does
            not end at the threshold.
    """

    temperature: float
    shift: float
    threshold: float
    unsure: tuple[float, float]
    false_alarm_rate: float
    miss_rate: float | None = None
    split: str = ""
    weights_sha256: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.shift, self.threshold, *self.unsure)
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(
                f"temperature, shift, threshold and unsure are {numbers}, expected finite numbers"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected more than 0")
        if len(self.unsure) != 2 or not 0 <= self.unsure[0] <= self.unsure[1]:
            raise ValueError(f"unsure is {list(self.unsure)}, expected [low, high] with 0 <= low <= high")
        if self.unsure[1] != self.threshold:
            raise ValueError(f"unsure ends at {self.unsure[1]}, expected the threshold {self.threshold}")

    def probability(self, p_fake: ArrayLike) -> NDArray[np.float64]:
        """The calibrated P(fake), float64 of the same shape as `p_fake`."""
        return calibrated_probability(np.asarray(p_fake, np.float64), self.temperature, self.shift)

    def calls_fake(self, p: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which calibrated probabilities [N] are called fake when nothing may stay undecided."""
        return p >= self.threshold

    def abstains(self, p: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which calibrated probabilities [N] stay undecided."""
        low, high = self.unsure
        return (low <= p) & (p < high)

    def verdict(self, p: float) -> Verdict:
        """The verdict for one calibrated probability."""
        if p >= self.threshold:
            return "AI-generated"
        return "unsure" if p >= self.unsure[0] else "real"

    def summary(self) -> dict[str, Any]:
        """The values that a predictions table stores; `from_summary` reads them."""
        return {**{key: getattr(self, key) for key in _SUMMARY}, "unsure": list(self.unsure)}

    @classmethod
    def from_summary(cls, values: Mapping[str, Any]) -> "Calibration":
        """Read the result of `summary`.

        Raises:
            ValueError, TypeError, KeyError: a value is missing or invalid.
        """
        low, high = (float(value) for value in values["unsure"])
        numbers: dict[str, Any] = {key: float(values[key]) for key in _SUMMARY if key != "unsure"}
        if not math.isfinite(numbers["false_alarm_rate"]):
            raise ValueError("false_alarm_rate must be finite")
        return cls(**numbers, unsure=(low, high))

    def to_dict(self) -> dict[str, Any]:
        """The content of the calibration file, as plain JSON values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "unsure": list(self.unsure)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Read the result of `to_dict`, whose format and version the caller has checked.

        Raises:
            ValueError, TypeError, KeyError: a value is missing, unknown or invalid.
        """
        fields = {key: value for key, value in values.items() if key not in ("format", "version")}
        for key in ("miss_rate", "split", "weights_sha256"):
            fields[key]  # has a default for tables, but not for files
        return cls(**{**fields, "unsure": tuple(fields["unsure"]), "notes": tuple(fields.get("notes", ()))})


def calibration_of(table: pa.Table) -> Calibration | None:
    """The calibration of the checkpoint that predicted `table`; None where it had none.

    Raises:
        UserError: a value of the table's calibration is missing or invalid.
    """
    stored = checkpoint_info(table).get("calibration")
    if stored is None:
        return None
    try:
        return Calibration.from_summary(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"predictions: the calibration of their checkpoint is damaged ({_what(error)}); "
            "calibrate the checkpoint and evaluate again"
        ) from None


def uncalibrated_verdict(p: float) -> Verdict:
    """The verdict for a raw P(fake), where there is no calibration."""
    return "AI-generated" if p >= 0.5 else "real"


def calibration_path(checkpoint: str | Path) -> Path:
    """The path of a checkpoint's calibration: RUN/best.calibration.json beside RUN/best.pt.

    An export's is model.calibration.json, inside its folder.
    """
    from engines.checkpoint.files import locate

    path = locate(checkpoint)
    return path / "model.calibration.json" if path.is_dir() else path.with_suffix(".calibration.json")


def save_calibration(checkpoint: str | Path, calibration: Calibration) -> Path:
    """Write it beside the checkpoint, atomically; an earlier one is replaced.

    Raises:
        UserError: it cannot be written.
    """
    path = calibration_path(checkpoint)
    with writing(path, hint="make its folder writable"):
        write_text(path, json.dumps(calibration.to_dict(), indent=2, allow_nan=False) + "\n")
    return path


def load_calibration(checkpoint: str | Path, weights: Mapping[str, "torch.Tensor"]) -> Calibration | None:
    """Read the calibration beside a checkpoint; None where there is none.

    A calibration of other weights is an error rather than a warning: falling back to raw
    probabilities would silently change the verdicts of the same command.

    Args:
        weights: the state dict of the model that the checkpoint holds.

    Raises:
        UserError: not a calibration, or one of other weights.
    """
    from engines.checkpoint.files import weights_sha256

    path = calibration_path(checkpoint)
    again = f"run `telltale calibrate --checkpoint {checkpoint}` again, or delete the file"
    try:
        values = read_versioned_json(path, FORMAT, (VERSION,), again, what="a calibration")
    except FileNotFoundError:
        return None
    try:
        calibration = Calibration.from_dict(values)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: not a calibration ({_what(error)}); {again}") from None
    if calibration.weights_sha256 != weights_sha256(weights):
        raise UserError(f"{path}: belongs to other weights than {checkpoint} now holds; {again}")
    return calibration


def _what(error: Exception) -> str:
    """What a KeyError or another error says, in one short line."""
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else one_line(error)[:200]
