"""Naming the generator: the likeliest one is not the true one."""

from engines.evaluate.columns import MERGED, Labels
from engines.evaluate.sections.base import Metric, MetricSection, Resampled, SectionValues, Show
from engines.stats.scores import Bools

CANNOT_MERGE = f"the label space has not both of {' and '.join(MERGED)}"


def _overall(section: SectionValues, labels: Labels) -> None:
    true, predicted = labels.generator[labels.closed], labels.generator_pred[labels.closed]
    section.error("generator_error", true, predicted)
    if labels.can_merge:
        section.error("generator_error_sd_merged", labels.merged(true), labels.merged(predicted))
    else:
        section.null("generator_error_sd_merged", CANNOT_MERGE)


def _per_generator(section: SectionValues, labels: Labels, index: int) -> None:
    if index < len(labels.space):
        rows = labels.generator == index
        section.error("generator_error", labels.generator[rows], labels.generator_pred[rows])
    else:
        section.null("generator_error", "not in the model's label space")


def _wrong(labels: Labels) -> tuple[Bools, Bools]:
    return labels.generator != labels.generator_pred, labels.closed


def _wrong_merged(labels: Labels) -> tuple[Bools, Bools] | None:
    if not labels.can_merge:
        return None
    return labels.merged(labels.generator) != labels.merged(labels.generator_pred), labels.closed


SECTION = MetricSection(
    place=10,
    overall=_overall,
    per_generator=_per_generator,
    metrics=(
        Metric(
            key="generator_error",
            resampled=Resampled(place=10, values=_wrong, each=True),
            averaged=True,
            error=True,
            compared=Show("naming the generator", 30),
            by_generator=True,
            card=Show("generator error", 40),
            column=Show("generator error", 80),
            row=Show("generator", 10),
            generator_column=Show("generator", 10),
        ),
        Metric(
            key="generator_error_sd_merged",
            resampled=Resampled(place=110, values=_wrong_merged, missing=CANNOT_MERGE),
            row=Show("generator, SD 1.4 and 1.5 as one", 20),
        ),
    ),
)
