"""The intervals of metrics.json: which figures are resampled, and the reasons where none is possible."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engines.evaluate.columns import Labels
from engines.evaluate.sections.base import Metric, Resampled, SectionValues, Weighted
from engines.evaluate.sections.registry import all_metrics, averaged_keys
from engines.stats.bootstrap import (
    LEVEL,
    Figures,
    Ranking,
    Sample,
    Shares,
    over_generators,
    percentile_interval,
    resample,
)
from engines.stats.scores import Floats
from engines.stats.significance import wilson

DEFAULT_RESAMPLES, DEFAULT_SEED = 1000, 0
NO_GROUPS = "no two images share a group"
_METHOD = (
    "percentile bootstrap, seeded; images: resampled within each true generator; groups: whole groups of "
    "images resampled; generators: the generators resampled, each with its resampled images; a share of "
    "exactly 0 or 1 has Wilson's interval instead"
)


def sample_of(labels: Labels) -> Sample:
    """The table's images, as the bootstrap resamples them."""
    return Sample(labels.generator, len(labels.generators), labels.sample_id, labels.cluster)


def resampled_metrics() -> dict[str, tuple[Metric, Resampled]]:
    """The metrics that get intervals, by key, in their order."""
    return {
        key: (metric, metric.resampled)
        for key, metric in all_metrics().items()
        if metric.resampled is not None
    }


class Headline:
    """The figures that get intervals, for any weights of the images."""

    def __init__(self, labels: Labels, sample: Sample) -> None:
        self._metrics = {key: how for key, (_, how) in resampled_metrics().items()}
        columns = {}
        for key, how in self._metrics.items():
            values = None if how.values is None else how.values(labels)
            if values is not None:
                columns[key] = values
        self.shares = Shares(sample, columns)
        self._ranking = Ranking(sample, labels.p_fake)

    def __call__(self, weights: Floats) -> Figures:
        """The figures for weights [B, N], in the sample's order; NaN where they are undefined."""
        ranked = self._ranking(weights)
        sums, counts = self.shares.sums(weights)
        weighted = Weighted(sums, counts, ranked)
        overall: dict[str, Floats] = {}
        each: dict[str, Floats] = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for key, how in self._metrics.items():
                if key in sums:
                    overall[key] = weighted.mean(key)
                    if how.each:
                        each[key] = sums[key] / counts[key]
                derived = None if how.derive is None else how.derive(weighted)
                for figures, values in zip((overall, each), derived or (), strict=False):
                    if values is not None:
                        figures[key] = values
        return Figures(overall, each)


class _Intervals:
    """Intervals of one way to resample, as sections."""

    def __init__(self, sample: Sample, headline: Headline, figures: Figures, name: str) -> None:
        self._sample, self._figures, self._shares = sample, figures, headline.shares
        self._how = {key: how for key, (_, how) in resampled_metrics().items()}
        self._name, self._grouped = name, name == "groups"

    def section(
        self, where: str, values: Mapping[str, Any], index: int | None, reasons: dict[str, str]
    ) -> Any:
        """Intervals of the figures of all images (`index` None) or of one generator."""
        section = SectionValues(f"intervals.{self._name}.{where}", reasons)
        figures = self._figures.overall if index is None else self._figures.each
        for key in figures:
            if values.get(key) is None:
                section.null(key, "no value")
                continue
            interval = percentile_interval(figures[key] if index is None else figures[key][:, index])
            if isinstance(interval, str) and self._how[key].share and values[key] in (0.0, 1.0):
                units = self._units(key, index)
                interval = wilson(round(values[key] * units), units)
            if isinstance(interval, str):
                section.null(key, interval)
            else:
                section.values[key] = interval
        return section.values

    def _units(self, key: str, index: int | None) -> int:
        """How many independent images or groups a share rests on."""
        counted, how = self._shares.counted.get(key), self._how[key]
        starts, everything = self._sample.starts, len(self._sample)
        real = self._sample.units(counted, slice(0, int(starts[1])), grouped=self._grouped)
        if index is not None:
            rows = slice(int(starts[index]), int(starts[index + 1]))
            units = self._sample.units(counted, rows, grouped=self._grouped)
            if not how.against_nature:
                return units
            # A group may hold both images of the generator and photographs.
            return max(real, units) if self._grouped else real + units
        if how.images == "real":
            return real
        first = int(starts[1]) if how.images == "fake" else 0
        return self._sample.units(counted, slice(first, everything), grouped=self._grouped)


def compute_intervals(
    labels: Labels,
    overall: Mapping[str, Any],
    per_generator: Mapping[str, Mapping[str, Any]],
    reasons: dict[str, str],
    *,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = DEFAULT_SEED,
) -> dict[str, Any]:
    """The part `intervals` of metrics.json.

    Args:
        overall, per_generator: the values, by name.
        reasons: receives the reason of each interval that is null.
        resamples, seed: of the bootstrap.

    Returns:
        level, method, resamples, seed, headline ("groups" where there are groups, else
        "images"), and intervals [low, high] under images, groups and generators.
    """
    sample = sample_of(labels)
    headline = Headline(labels, sample)
    part: dict[str, Any] = {
        "level": LEVEL,
        "method": _METHOD,
        "resamples": resamples,
        "seed": seed,
        "headline": "images" if labels.cluster is None else "groups",
    }
    figures: dict[str, Figures] = {}
    for name in ("images", "groups"):
        if name == "groups" and labels.cluster is None:
            part[name] = None
            reasons["intervals.groups"] = NO_GROUPS
            continue
        grouped = name == "groups"
        figures[name] = resample(sample, headline, resamples=resamples, seed=seed, grouped=grouped)
        intervals = _Intervals(sample, headline, figures[name], name)
        part[name] = {
            "overall": intervals.section("overall", overall, None, reasons),
            "per_generator": {
                generator: intervals.section(
                    f"per_generator.{generator}", per_generator[generator], index, reasons
                )
                for index, generator in enumerate(labels.generators)
            },
        }
    part["generators"] = _of_means(
        labels.generators, per_generator, figures[part["headline"]].each, seed, reasons
    )
    return part


def _of_means(
    names: Sequence[str],
    per_generator: Mapping[str, Mapping[str, Any]],
    each: Mapping[str, Floats],
    seed: int,
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Intervals of the means over generators, by resampling these too."""
    section = SectionValues("intervals.generators", reasons)
    for key in averaged_keys():
        columns = [i for i, name in enumerate(names) if i and per_generator[name][key] is not None]
        if len(columns) < 2:
            section.null(key, "fewer than 2 generators")
            continue
        interval = percentile_interval(over_generators(each[key], np.array(columns), seed=seed))
        if isinstance(interval, str):
            section.null(key, interval)
        else:
            section.values[key] = interval
    return section.values
