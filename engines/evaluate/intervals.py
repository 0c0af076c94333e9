"""The intervals of metrics.json: which figures are resampled, and what stands where it cannot be."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engines.evaluate.columns import Labels
from engines.evaluate.predictions import TOP
from engines.evaluate.sections import Section
from engines.stats import scores
from engines.stats.bootstrap import (
    LEVEL,
    RANKED,
    Figures,
    Ranking,
    Sample,
    Shares,
    over_generators,
    percentile_interval,
    resample,
)
from engines.stats.scores import Bools, Floats
from engines.stats.significance import wilson

RESAMPLES, SEED = 1000, 0
NO_GROUPS = "no two images share a group"
METHOD = (
    "percentile bootstrap, seeded; images: resampled within each true generator; groups: whole groups of "
    "images resampled; generators: the generators resampled, each with its resampled images; a share of "
    "exactly 0 or 1 has Wilson's interval instead"
)
# Figures that have a mean over generators.
AVERAGED = (
    "generator_error",
    "real_fake_error",
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "ap",
    "tpr_at_fpr_1",
    "tpr_at_fpr_5",
)
_REAL = ("accuracy_real", "false_alarm_rate_calibrated")
_FAKE = ("accuracy_fake", "detection_rate_calibrated")
_NO_SHARES = ("nll", "brier", "balanced_accuracy", *RANKED)
_EACH = (
    "generator_error",
    "real_fake_error",
    "real_fake_error_calibrated",
    "object_error",
    "accuracy",
    "balanced_accuracy",
    *RANKED,
)


def sample_of(t: Labels) -> Sample:
    """The table's images as what is resampled."""
    return Sample(t.generator, len(t.generators), t.sample_id, t.cluster)


class Headline:
    """The figures that get intervals, for any weights of the images."""

    def __init__(self, t: Labels, sample: Sample) -> None:
        columns: dict[str, tuple[Any, Bools | None]] = {
            "generator_error": (t.generator != t.generator_pred, t.closed),
            "real_fake_error": (t.called_fake != t.fake, None),
            "real_fake_error_argmax": ((t.generator_pred != 0) != t.fake, None),
            "object_error": (t.object != t.object_pred, t.known),
            "object_error_nature": (t.object != t.object_pred, t.known & ~t.fake),
            "object_error_fake": (t.object != t.object_pred, t.known & t.fake),
            "joint_error": (
                (t.generator != t.generator_pred) | (t.object != t.object_pred),
                t.known & t.closed,
            ),
            "nll": (scores.image_nll(t.fake, t.p_fake), None),
            "brier": ((t.p_fake - t.fake) ** 2, None),
        }
        if len(t.objects) > TOP:
            columns["object_top5_error"] = (~t.in_top5, t.known)
        if t.can_merge:
            columns["generator_error_sd_merged"] = (
                t.merged(t.generator) != t.merged(t.generator_pred),
                t.closed,
            )
        if t.called_fake_calibrated is not None:
            columns["real_fake_error_calibrated"] = (t.called_fake_calibrated != t.fake, None)
        self.shares = Shares(sample, columns)
        self._ranking = Ranking(sample, t.p_fake)

    def __call__(self, weights: Floats) -> Figures:
        """The figures for weights [B, N], in the sample's order; NaN where they are undefined."""
        ranked = self._ranking(weights)
        values, counts = self.shares.sums(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            overall = {key: values[key].sum(1) / counts[key].sum(1) for key in values}
            each = {key: values[key] / counts[key] for key in values if key in _EACH}
            wrong, count = values["real_fake_error"], counts["real_fake_error"]
            on_real, on_fake = each["real_fake_error"][:, 0], wrong[:, 1:].sum(1) / count[:, 1:].sum(1)
            overall |= {
                "accuracy": 1 - overall["real_fake_error"],
                "accuracy_real": 1 - on_real,
                "accuracy_fake": 1 - on_fake,
                "balanced_accuracy": 1 - (on_real + on_fake) / 2,
            }
            both = (wrong + wrong[:, :1]) / (count + count[:, :1])
            each |= {
                "accuracy": 1 - both,
                "balanced_accuracy": 1 - (each["real_fake_error"] + on_real[:, None]) / 2,
            }
            if "real_fake_error_calibrated" in values:
                wrong = values["real_fake_error_calibrated"]
                overall["false_alarm_rate_calibrated"] = wrong[:, 0] / count[:, 0]
                overall["detection_rate_calibrated"] = 1 - wrong[:, 1:].sum(1) / count[:, 1:].sum(1)
        return Figures({**overall, **ranked.overall}, {**each, **ranked.each})


class _Intervals:
    """Intervals of one way to resample, as sections."""

    def __init__(self, t: Labels, sample: Sample, headline: Headline, figures: Figures, name: str) -> None:
        self._t, self._sample, self._figures, self._shares = t, sample, figures, headline.shares
        self._name, self._grouped = name, name == "groups"

    def section(
        self, where: str, values: Mapping[str, Any], index: int | None, reasons: dict[str, str]
    ) -> Any:
        """Intervals of the figures of all images (`index` None) or of one generator."""
        section = Section(f"intervals.{self._name}.{where}", reasons)
        figures = self._figures.overall if index is None else self._figures.each
        for key in figures:
            if values.get(key) is None:
                section.null(key, "no value")
                continue
            found = percentile_interval(figures[key] if index is None else figures[key][:, index])
            if isinstance(found, str) and key not in _NO_SHARES and values[key] in (0.0, 1.0):
                units = self._units(key, index)
                found = wilson(round(values[key] * units), units)
            if isinstance(found, str):
                section.null(key, found)
            else:
                section.values[key] = found
        return section.values

    def _units(self, key: str, index: int | None) -> int:
        """How many independent images or groups a share rests on."""
        counted = self._shares.counted.get(key)
        starts, everything = self._sample.starts, len(self._sample)
        real = self._sample.units(counted, slice(0, int(starts[1])), grouped=self._grouped)
        if index is not None:
            own = slice(int(starts[index]), int(starts[index + 1]))
            units = self._sample.units(counted, own, grouped=self._grouped)
            if key != "accuracy":
                return units
            # Of a generator and nature; groups may hold both.
            return max(real, units) if self._grouped else real + units
        if key in _REAL:
            return real
        first = int(starts[1]) if key in _FAKE else 0
        return self._sample.units(counted, slice(first, everything), grouped=self._grouped)


def compute_intervals(
    t: Labels,
    overall: Mapping[str, Any],
    per_generator: Mapping[str, Mapping[str, Any]],
    reasons: dict[str, str],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """The part `intervals` of metrics.json.

    Args:
        overall, per_generator: the values themselves, by name.
        reasons: gets the reason of each interval that is null.

    Returns:
        level, method, resamples, seed, headline ("groups" where there are groups, else
        "images"), and intervals [low, high] under images, groups and generators.
    """
    sample = sample_of(t)
    headline = Headline(t, sample)
    found: dict[str, Any] = {
        "level": LEVEL,
        "method": METHOD,
        "resamples": resamples,
        "seed": seed,
        "headline": "images" if t.cluster is None else "groups",
    }
    figures: dict[str, Figures] = {}
    for name in ("images", "groups"):
        if name == "groups" and t.cluster is None:
            found[name] = None
            reasons["intervals.groups"] = NO_GROUPS
            continue
        grouped = name == "groups"
        figures[name] = resample(sample, headline, resamples=resamples, seed=seed, grouped=grouped)
        part = _Intervals(t, sample, headline, figures[name], name)
        found[name] = {
            "overall": part.section("overall", overall, None, reasons),
            "per_generator": {
                generator: part.section(
                    f"per_generator.{generator}", per_generator[generator], index, reasons
                )
                for index, generator in enumerate(t.generators)
            },
        }
    found["generators"] = _of_means(
        t.generators, per_generator, figures[found["headline"]].each, seed, reasons
    )
    return found


def _of_means(
    names: Sequence[str],
    per_generator: Mapping[str, Mapping[str, Any]],
    each: Mapping[str, Floats],
    seed: int,
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Intervals of the means over generators, by resampling these too."""
    section = Section("intervals.generators", reasons)
    for key in AVERAGED:
        there = [i for i, name in enumerate(names) if i and per_generator[name][key] is not None]
        if len(there) < 2:
            section.null(key, "fewer than 2 generators")
            continue
        interval = percentile_interval(over_generators(each[key], np.array(there), seed=seed))
        if isinstance(interval, str):
            section.null(key, interval)
        else:
            section.values[key] = interval
    return section.values
