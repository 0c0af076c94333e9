"""The part `confusion`: confusion matrices of generators and of real and fake."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from engines.evaluate.columns import MERGED, Labels
from engines.evaluate.sections.base import NO_CALIBRATION, MetricSection, SectionValues
from engines.evaluate.sections.generator_error import CANNOT_MERGE


def _confusions(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    section, names = SectionValues("confusion", reasons), labels.generators
    section.values["generator"] = _confusion(names, labels.generator, labels.generator_pred)
    if labels.can_merge:
        kept = [index for index, name in enumerate(names) if name != MERGED[1]]
        merged = ["stable_diffusion" if names[i] == MERGED[0] else names[i] for i in kept]
        true, predicted = (
            np.searchsorted(kept, labels.merged(column))
            for column in (labels.generator, labels.generator_pred)
        )
        section.values["generator_sd_merged"] = _confusion(merged, true, predicted)
    else:
        section.null("generator_sd_merged", CANNOT_MERGE)
    section.values["real_fake"] = _real_fake(labels, labels.called_fake)
    if labels.called_fake_calibrated is None:
        section.null("real_fake_calibrated", NO_CALIBRATION)
    else:
        section.values["real_fake_calibrated"] = _real_fake(labels, labels.called_fake_calibrated)
    return section.values


def _real_fake(labels: Labels, called: NDArray[np.bool_]) -> dict[str, Any]:
    return _confusion(("real", "fake"), labels.fake.astype(int), called.astype(int))


def _confusion(names: Sequence[str], true: NDArray[Any], predicted: NDArray[Any]) -> dict[str, Any]:
    size = len(names)
    # scikit-learn refuses an empty table.
    matrix = (
        confusion_matrix(true, predicted, labels=range(size)) if len(true) else np.zeros((size, size), int)
    )
    return {"labels": list(names), "matrix": matrix.tolist()}


SECTION = MetricSection(place=70, part=("confusion", _confusions))
