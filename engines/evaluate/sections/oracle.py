"""The part `oracle_upper_bound`: the threshold chosen on the test images themselves."""

from typing import Any

import numpy as np

from engines.evaluate.columns import Labels
from engines.evaluate.sections.base import CLASS_NAMES, MetricSection, SectionValues
from engines.stats.scores import Bools, best_threshold

_NOTE = (
    "the threshold that is best for these very images: no threshold chosen beforehand can do better, "
    "so this is an upper bound and no result"
)


def _oracle(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """The best threshold for all images, and for each generator against all photographs."""
    where = "oracle_upper_bound"
    every = np.ones(len(labels.fake), bool)
    part: dict[str, Any] = {
        "note": _NOTE,
        "overall": _best(labels, every, CLASS_NAMES, f"{where}.overall", reasons),
        "per_generator": {},
    }
    for index, name in enumerate(labels.generators[1:], start=1):
        rows = (labels.generator == index) | ~labels.fake
        names = (name, CLASS_NAMES[1])
        part["per_generator"][name] = _best(labels, rows, names, f"{where}.per_generator.{name}", reasons)
    return part


def _best(
    labels: Labels, rows: Bools, names: tuple[str, str], where: str, reasons: dict[str, str]
) -> dict[str, Any]:
    section = SectionValues(where, reasons)
    fake, p = labels.fake[rows], labels.p_fake[rows]
    missing = [name for name, some in zip(names, (fake.any(), (~fake).any()), strict=True) if not some]
    if missing:
        section.nulls(("accuracy", "threshold", "balanced_accuracy"), f"no images of {' and '.join(missing)}")
    else:
        section.values |= best_threshold(fake, p)
    return section.values


SECTION = MetricSection(place=80, part=("oracle_upper_bound", _oracle))
