"""What a metric declares, and how a section of metrics.json collects values and reasons."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, zero_one_loss

from engines.evaluate.columns import Labels
from engines.stats.bootstrap import Figures
from engines.stats.scores import Bools, Floats

NO_IMAGES = "no images"
NO_OBJECTS = "no image with a known object"
NO_CALIBRATION = "no calibration"
CLASS_NAMES = ("any generator", "nature")  # the positive and the negative class in reasons


def lacks_class(fake: Bools, names: tuple[str, str] = CLASS_NAMES) -> str:
    """Why figures of real against fake cannot be computed for truth fake [n]; "" where they can.

    An error is among them: a constant answer would have none.

    Args:
        names: of the fakes and of the photographs.
    """
    if not len(fake):
        return NO_IMAGES
    missing = [name for name, some in zip(names, (fake.any(), (~fake).any()), strict=True) if not some]
    return f"no images of {' and '.join(missing)}" if missing else ""


class SectionValues:
    """The values of one part of metrics.json; a value that cannot be computed leaves its reason."""

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
        """The share of rows in which two arrays [n] differ; null for the reason `empty` if n = 0."""
        if len(true):
            self.values[key] = float(zero_one_loss(true, predicted))
        else:
            self.null(key, empty)

    def share(self, key: str, flags: Bools, empty: str) -> None:
        """The share of flags [n] that are set; null for the reason `empty` if n = 0."""
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


@dataclass(frozen=True)
class Weighted:
    """Figures of B weighted resamples, for metrics that follow from others.

    Attributes:
        sums, counts: by key of a metric with `Resampled.values`, [B, G]: the weighted sum of
            its values and of the weights that count, for each generator (column 0 is nature).
        ranked: AUROC, AP and detection rates, see `engines.stats.bootstrap.Ranking`.
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, Floats]
    ranked: Figures

    def mean(self, key: str, generators: slice | int = slice(None)) -> Floats:
        """The weighted mean [B] over the images of some generators."""
        return _total(self.sums[key][:, generators]) / _total(self.counts[key][:, generators])


def _total(values: Floats) -> Floats:
    return values if values.ndim == 1 else values.sum(1)


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """How a metric is computed from weighted images, for bootstrap intervals and comparisons.

    Exactly one of `values` and `derive` is given.

    Attributes:
        place: its position among the intervals; lower comes first.
        values: the metric is the mean of these values [N] over the images that count
            (bool [N], None for all); None where this table does not have it.
        derive: from `Weighted` to the figure of all images [B] and of each generator [B, G],
            None for those that it lacks.
        each: whether each generator has it too; of `values` only.
        images: the images it rests on. against_nature: a generator's figure rests on the
            generator's images and on all photographs.
        share: a share in [0, 1], which gets Wilson's interval where it is exactly 0 or 1.
        missing: why `values` may be None. empty: why the figure may be undefined.
    """

    place: int
    values: Callable[[Labels], tuple[NDArray[Any], Bools | None] | None] | None = None
    derive: Callable[[Weighted], tuple[Floats | None, Floats | None] | None] | None = None
    each: bool = False
    images: Literal["all", "real", "fake"] = "all"
    against_nature: bool = False
    share: bool = True
    missing: str = NO_CALIBRATION
    empty: str = NO_IMAGES


@dataclass(frozen=True)
class Show:
    """A place where a metric is shown: its heading, and its position there (lower comes first)."""

    title: str
    place: int


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One key of metrics.json and where it appears.

    Attributes:
        key: its name in metrics.json.
        score: shown as 0.1234; otherwise as a percentage.
        resampled: how it gets intervals; None for no interval.
        two_classes: for all images, it needs both photographs and fakes.
        averaged: its mean, deviation and worst value over generators are in `over_generators`.
        compared: in comparisons of two detectors. by_generator: there for each generator too,
            on the terminal. error: a share of wrong images, which gets McNemar's test.
        card: a headline of the report. column: a column of the report's table of generators.
        row: a row of the terminal's table of errors, and `total`, from metrics.json's counts
            to how many images it is a share of.
        generator_column: a column of the terminal's table of generators.
    """

    key: str
    score: bool = False
    resampled: Resampled | None = None
    two_classes: bool = False
    averaged: bool = False
    compared: Show | None = None
    by_generator: bool = False
    error: bool = False
    card: Show | None = None
    column: Show | None = None
    row: Show | None = None
    total: Callable[[Mapping[str, Any]], int] = lambda counts: int(counts["images"])
    generator_column: Show | None = None


@dataclass(frozen=True, kw_only=True)
class MetricSection:
    """A family of metrics: the content of one file.

    Attributes:
        place: its position in metrics.json and on the terminal; lower comes first.
        generator_place: its position in `per_generator`, if another.
        metrics: the keys that have intervals or are shown somewhere.
        overall: adds its values for all images.
        per_generator: adds its values for one generator, by index.
        per_object: adds its values for the images of one object, by rows int64 [n].
        part: name and content of a part of metrics.json of its own; gets the reasons.
        lines: from metrics.json to lines for the terminal.
    """

    place: int
    generator_place: int | None = None
    metrics: Sequence[Metric] = ()
    overall: Callable[[SectionValues, Labels], None] | None = None
    per_generator: Callable[[SectionValues, Labels, int], None] | None = None
    per_object: Callable[[SectionValues, Labels, NDArray[np.int64]], None] | None = None
    part: tuple[str, Callable[[Labels, dict[str, str]], dict[str, Any]]] | None = None
    lines: Callable[[Mapping[str, Any]], list[str]] | None = None


def percent_text(value: float | None) -> str:
    """A fraction as text: "12.34 %", or "-" where there is none."""
    return "-" if value is None else f"{100 * value:.2f} %"


def score_text(value: float | None) -> str:
    """A score as text: "0.1234", or "-" where there is none."""
    return "-" if value is None else f"{value:.4f}"


def headline_intervals(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The intervals to show: over groups where images share groups, otherwise over images."""
    intervals: Mapping[str, Any] = metrics["intervals"]
    shown: Mapping[str, Any] = intervals[intervals["headline"]]
    return shown
