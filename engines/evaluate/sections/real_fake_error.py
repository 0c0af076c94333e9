"""Calling photographs fake or fakes real: at P(fake) >= 0.5, or by the likeliest generator."""

from engines.evaluate.columns import Labels
from engines.evaluate.sections.base import Metric, MetricSection, Resampled, SectionValues, Show, lacks_class


def _overall(section: SectionValues, labels: Labels) -> None:
    if missing := lacks_class(labels.fake):
        section.nulls(("real_fake_error", "real_fake_error_argmax"), missing)
        return
    section.error("real_fake_error", labels.fake, labels.called_fake)
    section.error("real_fake_error_argmax", labels.fake, labels.generator_pred != 0)


def _per_generator(section: SectionValues, labels: Labels, index: int) -> None:
    rows = labels.generator == index
    section.error("real_fake_error", labels.fake[rows], labels.called_fake[rows])


SECTION = MetricSection(
    place=20,
    overall=_overall,
    per_generator=_per_generator,
    metrics=(
        Metric(
            key="real_fake_error",
            two_classes=True,
            resampled=Resampled(
                place=20, values=lambda labels: (labels.called_fake != labels.fake, None), each=True
            ),
            averaged=True,
            error=True,
            compared=Show("real/fake at P(fake) >= 0.5", 10),
            by_generator=True,
            card=Show("real/fake error, P(fake) ≥ 0.5", 20),
            row=Show("real/fake, P(fake) >= 0.5", 30),
            generator_column=Show("real/fake", 20),
        ),
        Metric(
            key="real_fake_error_argmax",
            two_classes=True,
            resampled=Resampled(
                place=30, values=lambda labels: ((labels.generator_pred != 0) != labels.fake, None)
            ),
            row=Show("real/fake, likeliest generator", 40),
        ),
    ),
)
