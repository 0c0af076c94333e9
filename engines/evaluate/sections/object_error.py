"""Naming the object, where it is known: top 1 and top 5, on all images, photographs and fakes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.evaluate.columns import Labels
from engines.evaluate.predictions import TOP
from engines.evaluate.sections.base import NO_OBJECTS, Metric, MetricSection, Resampled, SectionValues, Show
from engines.stats.scores import Bools

_FEW = f"the label space has no more than {TOP} objects"


def _overall(section: SectionValues, labels: Labels) -> None:
    known = labels.known
    for suffix, rows, empty in (
        ("", known, NO_OBJECTS),
        ("_nature", known & ~labels.fake, "no photograph with a known object"),
        ("_fake", known & labels.fake, "no fake with a known object"),
    ):
        section.error(f"object_error{suffix}", labels.object[rows], labels.object_pred[rows], empty)
        if len(labels.objects) > TOP:
            section.error(f"object_top5_error{suffix}", known[rows], labels.in_top5[rows], empty)
        else:
            section.null(f"object_top5_error{suffix}", _FEW)
    right = (labels.generator == labels.generator_pred) & (labels.object == labels.object_pred)
    rows = known & labels.closed
    section.error("joint_error", known[rows], right[rows], NO_OBJECTS)


def _per_generator(section: SectionValues, labels: Labels, index: int) -> None:
    rows = (labels.generator == index) & labels.known
    section.error("object_error", labels.object[rows], labels.object_pred[rows], NO_OBJECTS)


def _per_object(section: SectionValues, labels: Labels, rows: NDArray[np.int64]) -> None:
    section.error("object_error", labels.object[rows], labels.object_pred[rows])


def _wrong(labels: Labels) -> Bools:
    return labels.object != labels.object_pred


def _joint(labels: Labels) -> tuple[Bools, Bools]:
    return (labels.generator != labels.generator_pred) | _wrong(labels), labels.known & labels.closed


def _top5(labels: Labels) -> tuple[Bools, Bools] | None:
    return (~labels.in_top5, labels.known) if len(labels.objects) > TOP else None


def _known(counts: Mapping[str, Any]) -> int:
    return int(counts["object_known"])


SECTION = MetricSection(
    place=30,
    overall=_overall,
    per_generator=_per_generator,
    per_object=_per_object,
    metrics=(
        Metric(
            key="object_error",
            resampled=Resampled(
                place=40,
                values=lambda labels: (_wrong(labels), labels.known),
                each=True,
                empty=NO_OBJECTS,
            ),
            error=True,
            compared=Show("naming the object", 40),
            card=Show("object error", 50),
            column=Show("object error", 90),
            row=Show("object", 60),
            total=_known,
            generator_column=Show("object", 30),
        ),
        Metric(
            key="object_error_nature",
            resampled=Resampled(
                place=50, values=lambda labels: (_wrong(labels), labels.known & ~labels.fake)
            ),
            row=Show("object, photographs only", 70),
            total=lambda counts: int(counts["object_known_nature"]),
        ),
        Metric(
            key="object_error_fake",
            resampled=Resampled(place=60, values=lambda labels: (_wrong(labels), labels.known & labels.fake)),
            row=Show("object, fakes only", 80),
            total=lambda counts: int(counts["object_known"] - counts["object_known_nature"]),
        ),
        Metric(
            key="object_top5_error",
            resampled=Resampled(place=100, values=_top5, missing=_FEW),
            row=Show("object not in the top 5", 90),
            total=_known,
        ),
        Metric(
            key="joint_error",
            resampled=Resampled(place=70, values=_joint),
            row=Show("generator or object", 100),
            total=_known,
        ),
    ),
)
