"""The frozen decision of a calibrated checkpoint, with and without abstaining."""

from collections.abc import Mapping
from typing import Any

from engines.evaluate.columns import Labels
from engines.evaluate.sections.base import (
    CLASS_NAMES,
    NO_CALIBRATION,
    NO_IMAGES,
    Metric,
    MetricSection,
    Resampled,
    SectionValues,
    Show,
    Weighted,
    lacks_class,
    percent_text,
    score_text,
)
from engines.evaluate.sections.detection import PROBABILITY, add_probability
from engines.stats.scores import Bools, Floats

_ERROR, _FALSE_ALARMS, _DETECTED = (
    "real_fake_error_calibrated",
    "false_alarm_rate_calibrated",
    "detection_rate_calibrated",
)
_UNSURE, _SURE_ERROR = "unsure_share_calibrated", "real_fake_error_sure_calibrated"


def _overall(section: SectionValues, labels: Labels) -> None:
    if labels.calibrated is None or labels.called_fake_calibrated is None or labels.unsure is None:
        quality = [f"{key}_calibrated" for key in PROBABILITY]
        section.nulls((_ERROR, _FALSE_ALARMS, _DETECTED, *quality, _UNSURE, _SURE_ERROR), NO_CALIBRATION)
        return
    called, sure = labels.called_fake_calibrated, ~labels.unsure
    missing = lacks_class(labels.fake)
    if missing:
        section.null(_ERROR, missing)
    else:
        section.error(_ERROR, labels.fake, called)
    section.share(_FALSE_ALARMS, called[~labels.fake], f"no images of {CLASS_NAMES[1]}")
    section.share(_DETECTED, called[labels.fake], f"no images of {CLASS_NAMES[0]}")
    add_probability(section, labels.fake, labels.calibrated, "_calibrated")
    section.share(_UNSURE, labels.unsure, NO_IMAGES)
    if missing:
        section.null(_SURE_ERROR, missing)
    else:
        section.error(_SURE_ERROR, labels.fake[sure], called[sure], "unsure of every image")


def _per_generator(section: SectionValues, labels: Labels, index: int) -> None:
    if labels.called_fake_calibrated is None:
        section.null(_ERROR, NO_CALIBRATION)
        return
    rows = labels.generator == index
    section.error(_ERROR, labels.fake[rows], labels.called_fake_calibrated[rows])


def _wrong(labels: Labels) -> tuple[Bools, None] | None:
    called = labels.called_fake_calibrated
    return None if called is None else (called != labels.fake, None)


def _false_alarms(w: Weighted) -> tuple[Floats, None] | None:
    return (w.mean(_ERROR, 0), None) if _ERROR in w.sums else None


def _detected(w: Weighted) -> tuple[Floats, None] | None:
    return (1 - w.mean(_ERROR, slice(1, None)), None) if _ERROR in w.sums else None


def _lines(metrics: Mapping[str, Any]) -> list[str]:
    overall = metrics["overall"]
    if overall[_UNSURE] is None:
        return []
    return [
        f"frozen threshold: false alarms {percent_text(overall[_FALSE_ALARMS])}, "
        f"detected {percent_text(overall[_DETECTED])}; "
        f"calibrated ECE {score_text(overall['ece_calibrated'])}",
        f"unsure of {percent_text(overall[_UNSURE])}; error on the rest {percent_text(overall[_SURE_ERROR])}",
    ]


SECTION = MetricSection(
    place=60,
    generator_place=25,
    overall=_overall,
    per_generator=_per_generator,
    lines=_lines,
    metrics=(
        Metric(
            key=_ERROR,
            two_classes=True,
            resampled=Resampled(place=120, values=_wrong, each=True),
            error=True,
            compared=Show("real/fake at each one's frozen threshold", 20),
            by_generator=True,
            card=Show("real/fake error at the frozen threshold", 10),
            row=Show("real/fake, frozen threshold", 50),
        ),
        Metric(
            key=_FALSE_ALARMS,
            resampled=Resampled(place=170, derive=_false_alarms, images="real"),
        ),
        Metric(key=_DETECTED, resampled=Resampled(place=180, derive=_detected, images="fake")),
    ),
)
