"""Separating fakes from photographs: accuracy at 0.5, ranking, and the quality of P(fake)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.evaluate.columns import THRESHOLD, Labels
from engines.evaluate.sections.base import (
    CLASS_NAMES,
    Metric,
    MetricSection,
    Resampled,
    SectionValues,
    Show,
    Weighted,
    headline_intervals,
    lacks_class,
    percent_text,
    score_text,
)
from engines.stats import scores
from engines.stats.scores import Bools, Floats

# Figures that need both real and fake images, and so do those of a probability: on one class, a
# constant answer would be perfect.
RANKING = ("auroc", "ap", "eer", *scores.RATES)
PROBABILITY: Mapping[str, Callable[[Bools, Floats], float]] = {
    "ece": scores.calibration_error,
    "nll": scores.nll,
    "brier": scores.brier,
}
DETECTION = ("accuracy", "balanced_accuracy", "accuracy_real", "accuracy_fake", *RANKING, *PROBABILITY)


def add_detection(
    section: SectionValues, fake: Bools, p: Floats, names: tuple[str, str] = CLASS_NAMES
) -> None:
    """Every figure of `DETECTION` for P(fake) p [n] and truth fake [n].

    Args:
        names: of the fakes and of the photographs, for reasons.
    """
    called = p >= THRESHOLD
    missing = lacks_class(fake, names)
    if missing:
        section.nulls(("accuracy", "balanced_accuracy", *RANKING), missing)
    else:
        section.values["accuracy"] = float(np.mean(called == fake))
        section.values["balanced_accuracy"] = scores.balanced_accuracy(fake, called)
        section.values["auroc"] = scores.auroc(fake, p)
        section.values["ap"] = scores.average_precision(fake, p)
        section.values |= scores.operating_points(fake, p)
    section.share("accuracy_real", ~called[~fake], f"no images of {names[1]}")
    section.share("accuracy_fake", called[fake], f"no images of {names[0]}")
    add_probability(section, fake, p, names=names)


def add_probability(
    section: SectionValues,
    fake: Bools,
    p: Floats,
    suffix: str = "",
    *,
    names: tuple[str, str] = CLASS_NAMES,
) -> None:
    """Every figure of `PROBABILITY` of p [n], under its name and `suffix`; see `add_detection`."""
    missing = lacks_class(fake, names)
    for key, formula in PROBABILITY.items():
        if missing:
            section.null(key + suffix, missing)
        else:
            section.values[key + suffix] = formula(fake, p)


def _per_generator(section: SectionValues, labels: Labels, index: int) -> None:
    """The generator's images against all photographs."""
    name, rows = labels.generators[index], labels.generator == index
    if index == 0:
        section.nulls(DETECTION, "nature is the negative class")
    elif not rows.any():
        # Figures of the photographs alone would say nothing about this generator.
        missing = [name] if (~labels.fake).any() else [name, CLASS_NAMES[1]]
        section.nulls(DETECTION, f"no images of {' and '.join(missing)}")
    else:
        rows = rows | ~labels.fake
        add_detection(section, labels.fake[rows], labels.p_fake[rows], (name, CLASS_NAMES[1]))


def _per_object(section: SectionValues, labels: Labels, rows: NDArray[np.int64]) -> None:
    add_detection(section, labels.fake[rows], labels.p_fake[rows])


_ERROR, _FAKES = "real_fake_error", slice(1, None)


def _accuracy(w: Weighted) -> tuple[Floats, Floats]:
    wrong, count = w.sums[_ERROR], w.counts[_ERROR]
    return 1 - w.mean(_ERROR), 1 - (wrong + wrong[:, :1]) / (count + count[:, :1])


def _balanced_accuracy(w: Weighted) -> tuple[Floats, Floats]:
    on_real, each = w.mean(_ERROR, 0), w.sums[_ERROR] / w.counts[_ERROR]
    return 1 - (on_real + w.mean(_ERROR, _FAKES)) / 2, 1 - (each + on_real[:, None]) / 2


def _ranked(key: str, place: int) -> Resampled:
    return Resampled(place=place, derive=lambda w: (w.ranked.overall[key], w.ranked.each[key]), share=False)


def _lines(metrics: Mapping[str, Any]) -> list[str]:
    overall, intervals = metrics["overall"], headline_intervals(metrics)["overall"]
    ranking = []
    for name, key in (("AUROC", "auroc"), ("AP", "ap")):
        interval = intervals.get(key)
        shown = "" if interval is None else f" ({score_text(interval[0])} to {score_text(interval[1])})"
        ranking.append(f"{name} {score_text(overall[key])}{shown}")
    accuracy = [percent_text(overall[key]) for key in ("accuracy_real", "accuracy_fake", "balanced_accuracy")]
    quality = [score_text(overall[key]) for key in ("ece", "nll", "brier")]
    lines = [
        f"real/fake: {', '.join(ranking)}; EER {percent_text(overall['eer'])}",
        f"accuracy on real {accuracy[0]}, on fake {accuracy[1]}, balanced {accuracy[2]}",
        f"detected at 1 % false alarms {percent_text(overall['tpr_at_fpr_1'])}, "
        f"at 5 % {percent_text(overall['tpr_at_fpr_5'])}; "
        f"ECE {quality[0]}, NLL {quality[1]}, Brier {quality[2]}",
    ]
    means = metrics["over_generators"]["balanced_accuracy"]
    if means["worst"] is not None:
        spread = "" if means["std"] is None else f" ± {100 * means['std']:.2f}"
        mean = f"balanced accuracy over generators: mean {100 * means['mean']:.2f}{spread} %"
        interval = metrics["intervals"]["generators"]["balanced_accuracy"]
        if interval is not None:
            mean += f" ({percent_text(interval[0])} to {percent_text(interval[1])})"
        worst = means["worst"]
        lines += [mean, f"worst generator: {worst['generator']}, {percent_text(worst['value'])}"]
    return lines


SECTION = MetricSection(
    place=40,
    overall=lambda section, labels: add_detection(section, labels.fake, labels.p_fake),
    per_generator=_per_generator,
    per_object=_per_object,
    lines=_lines,
    metrics=(
        Metric(
            key="accuracy",
            resampled=Resampled(place=130, derive=_accuracy, against_nature=True),
            averaged=True,
        ),
        Metric(
            key="accuracy_real",
            resampled=Resampled(place=140, derive=lambda w: (1 - w.mean(_ERROR, 0), None), images="real"),
        ),
        Metric(
            key="accuracy_fake",
            resampled=Resampled(
                place=150, derive=lambda w: (1 - w.mean(_ERROR, _FAKES), None), images="fake"
            ),
            column=Show("called fake", 10),
        ),
        Metric(
            key="balanced_accuracy",
            resampled=Resampled(place=160, derive=_balanced_accuracy, share=False),
            averaged=True,
            compared=Show("balanced accuracy", 50),
            column=Show("balanced accuracy", 20),
        ),
        Metric(
            key="auroc",
            score=True,
            resampled=_ranked("auroc", 200),
            averaged=True,
            compared=Show("AUROC", 60),
            by_generator=True,
            card=Show("AUROC", 30),
            column=Show("AUROC", 30),
            generator_column=Show("AUROC", 50),
        ),
        Metric(
            key="ap",
            score=True,
            resampled=_ranked("ap", 210),
            averaged=True,
            compared=Show("AP", 70),
            column=Show("AP", 40),
            generator_column=Show("AP", 40),
        ),
        Metric(key="eer", column=Show("EER", 50)),
        Metric(
            key="tpr_at_fpr_1",
            resampled=_ranked("tpr_at_fpr_1", 220),
            averaged=True,
            compared=Show("TPR at 1 % FPR", 80),
            column=Show("TPR at 1 % FPR", 60),
        ),
        Metric(
            key="tpr_at_fpr_5",
            resampled=_ranked("tpr_at_fpr_5", 230),
            averaged=True,
            compared=Show("TPR at 5 % FPR", 90),
        ),
        Metric(key="ece", score=True, column=Show("ECE", 70)),
        Metric(
            key="nll",
            score=True,
            resampled=Resampled(
                place=80,
                values=lambda labels: (scores.image_nll(labels.fake, labels.p_fake), None),
                share=False,
            ),
        ),
        Metric(
            key="brier",
            score=True,
            resampled=Resampled(
                place=90, values=lambda labels: ((labels.p_fake - labels.fake) ** 2, None), share=False
            ),
        ),
    ),
)
