"""The part `attribution`: naming the generator, nature included, as a classification."""

from collections.abc import Mapping
from typing import Any

from engines.evaluate.columns import Labels
from engines.evaluate.sections.base import NO_IMAGES, MetricSection, SectionValues, score_text
from engines.evaluate.sections.generator_error import CANNOT_MERGE


def _attribution(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """Accuracy and macro-F1, with Stable Diffusion 1.4 and 1.5 as two labels and as one."""
    section = SectionValues("attribution", reasons)
    true, predicted = labels.generator[labels.closed], labels.generator_pred[labels.closed]
    section.share("accuracy", true == predicted, NO_IMAGES)
    section.macro_f1("macro_f1", true, predicted)
    keys = ("accuracy_sd_merged", "macro_f1_sd_merged")
    if labels.can_merge:
        true, predicted = labels.merged(true), labels.merged(predicted)
        section.share(keys[0], true == predicted, NO_IMAGES)
        section.macro_f1(keys[1], true, predicted)
    else:
        section.nulls(keys, CANNOT_MERGE)
    return section.values


def _lines(metrics: Mapping[str, Any]) -> list[str]:
    attribution = metrics["attribution"]
    if attribution["macro_f1"] is None:
        return []
    line = f"attribution: macro-F1 {score_text(attribution['macro_f1'])}"
    if attribution["macro_f1_sd_merged"] is not None:
        line += f", SD 1.4 and 1.5 as one {score_text(attribution['macro_f1_sd_merged'])}"
    return [line]


SECTION = MetricSection(place=50, part=("attribution", _attribution), lines=_lines)
