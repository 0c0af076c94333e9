"""Compare two detectors on the same images: paired differences and one sentence on each error.

Differences are A's figure minus B's. Intervals are of the paired bootstrap: every resample
holds the same images (or groups of images) for both. The exact McNemar test uses the images
that only one of the two gets wrong; it assumes independent images, so where they share groups
the interval is the stricter criterion.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.core import atomic
from dataio.core.errors import UserError, writing
from dataio.core.log import log
from engines.evaluate.columns import Labels
from engines.evaluate.evaluate import PREDICTIONS
from engines.evaluate.intervals import Headline, sample_of
from engines.evaluate.pairing import Side, pair_images
from engines.evaluate.predictions import checkpoint_info, data_info, read_predictions
from engines.evaluate.sections.base import Metric, Show, lacks_class
from engines.evaluate.sections.registry import shown_in
from engines.stats.bootstrap import LEVEL, Figures, percentile_interval, resample
from engines.stats.scores import Bools, Floats
from engines.stats.significance import mcnemar_p
from engines.stats.text_table import text_table

SCHEMA, VERSION = "telltale-comparison", 1
_ALPHA = 1 - LEVEL
_METHOD = "paired percentile bootstrap, seeded, of images within each true generator, or of whole groups"


def _compared(metric: Metric) -> Show | None:
    return metric.compared


def predictions_file(path: str | Path) -> Path:
    """The predictions.parquet of an evaluation's folder, or the path itself if it is a file."""
    return Path(path) / PREDICTIONS if Path(path).is_dir() else Path(path)


def compare_evaluations(
    a: str, b: str, *, output: str | None = None, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compare two evaluations by path, and write the comparison to `output`.

    Raises:
        UserError: see `read_predictions` and `compare`; the output's folder does not exist
            (checked before anything is computed) or the file cannot be written.
    """
    if output is not None:
        folder = Path(output).absolute().parent
        if Path(output).is_dir() or not folder.is_dir():
            raise UserError(
                "expected a file in a folder that exists; choose another, such as comparison.json",
                field="output",
                value=output,
            )
    sides = [Side(path, read_predictions(predictions_file(path))) for path in (a, b)]
    comparison = compare(*sides, resamples=resamples, seed=seed)
    for note in comparison["notes"]:
        log.warning(note)
    if output is not None:
        with writing(output, field="output", hint="choose another file"):
            atomic.write_text(Path(output), json.dumps(comparison, indent=2, allow_nan=False) + "\n")
    return comparison


def compare(a: Side, b: Side, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compare two tables of predictions of the same images.

    Args:
        a, b: the detectors. resamples, seed: of the bootstrap.

    Returns:
        plain JSON values:
        schema, version, a, b (name, checkpoint, data, and images left out), images, paired_by, notes
        (see `engines.evaluate.pairing.Pairing`), groups, level, method, resamples,
        seed, resampled ("images" or "groups"), overall and per_generator (by figure: a, b,
        difference = a - b, interval of the difference and, for errors, mcnemar), sentences
        (by error), sentence (the one to quote) and reasons of null values.

    Raises:
        UserError: the tables hold different images (see `pair_images`), or a damaged calibration.
    """
    pair = _Pair(a, b, resamples, seed)
    reasons: dict[str, str] = {} if pair.grouped else {"groups": "no two images share a group"}
    overall = pair.figures(None, reasons)
    per_generator = {
        name: {"n": int((pair.a.generator == index).sum()), **pair.figures(index, reasons)}
        for index, name in enumerate(pair.a.generators)
    }
    sentences = {}
    for metric, title in shown_in(_compared):
        if not metric.error:
            continue
        key = metric.key
        sentences[key] = _sentence(a.name, b.name, f"on {len(pair.sample)} images, {title}", overall[key])
        if sentences[key] is None:
            reasons[f"sentences.{key}"] = reasons[f"overall.{key}"]
    sentence = sentences["real_fake_error_calibrated"] or sentences["real_fake_error"]
    if sentence is None:
        reasons["sentence"] = reasons["overall.real_fake_error"]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        **{
            letter: {
                "name": side.name,
                "checkpoint": checkpoint_info(side.table),
                "data": data_info(side.table) or None,
                "left_out": left_out,
            }
            for letter, side, left_out in zip("ab", (a, b), pair.pairing.left_out, strict=True)
        },
        "images": len(pair.sample),
        "paired_by": pair.pairing.paired_by,
        "notes": list(pair.pairing.notes),
        "groups": None if pair.sample.cluster is None else int(pair.sample.cluster.max()) + 1,
        "level": LEVEL,
        "method": _METHOD,
        "resamples": resamples,
        "seed": seed,
        "resampled": "groups" if pair.grouped else "images",
        "overall": overall,
        "per_generator": per_generator,
        "sentences": sentences,
        "sentence": sentence,
        "reasons": reasons,
    }


class _Pair:
    """Labels of both sides in the same order of images, their figures and resampled differences."""

    def __init__(self, a: Side, b: Side, resamples: int, seed: int) -> None:
        self.pairing = pair_images(a, b)
        self.a, self.b = Labels(self.pairing.a), Labels(self.pairing.b)
        # The draws must depend on the images, not on where one side's shards have them.
        self.a.sample_id = np.arange(len(self.a.fake))
        # Only one of the tables may have the groups.
        self.a.cluster = self.b.cluster if self.a.cluster is None else self.a.cluster
        self.sample = sample_of(self.a)
        self.grouped = self.sample.cluster is not None
        self._metrics = [metric for metric, _ in shown_in(_compared)]
        self._headlines = (Headline(self.a, self.sample), Headline(self.b, self.sample))
        self._points = [headline(np.ones((1, len(self.sample)))) for headline in self._headlines]
        self._drawn = resample(
            self.sample, self._differences, resamples=resamples, seed=seed, grouped=self.grouped
        )

    def _differences(self, weights: Floats) -> Figures:
        a, b = (headline(weights) for headline in self._headlines)
        return Figures(
            {key: a.overall[key] - b.overall[key] for key in a.overall if key in b.overall},
            {key: a.each[key] - b.each[key] for key in a.each if key in b.each},
        )

    def figures(self, index: int | None, reasons: dict[str, str]) -> dict[str, Any]:
        """Every figure of all images (`index` None) or of one generator; null ones leave reasons."""
        where = "overall" if index is None else f"per_generator.{self.a.generators[index]}"
        rows = np.ones(len(self.sample), bool) if index is None else self.a.generator == index
        figures: dict[str, Any] = {}
        for metric in self._metrics:
            key = metric.key
            if index is None and metric.two_classes and (missing := lacks_class(self.a.fake)):
                figures[key], reasons[f"{where}.{key}"] = None, missing
                continue
            # Nature is the negative class: it has errors only.
            if index == 0 and not metric.error:
                continue
            if index is None:
                values = [float(p.overall[key][0]) if key in p.overall else np.nan for p in self._points]
                drawn = self._drawn.overall.get(key)
            else:
                values = [float(p.each[key][0, index]) if key in p.each else np.nan for p in self._points]
                drawn = self._drawn.each[key][:, index] if key in self._drawn.each else None
            figures[key] = self._figure(metric, f"{where}.{key}", values, drawn, rows, reasons)
        return figures

    def _figure(
        self,
        metric: Metric,
        path: str,
        values: list[float],
        drawn: Floats | None,
        rows: Bools,
        reasons: dict[str, str],
    ) -> dict[str, Any] | None:
        """One figure: `values` [2] of both sides, `drawn` differences [B], `rows` bool [N]."""
        how = metric.resampled
        assert how is not None  # what is compared has intervals
        wrong = None
        if metric.error and how.values is not None:
            sides = [how.values(labels) for labels in (self.a, self.b)]
            if sides[0] is None or sides[1] is None:
                reasons[path] = how.missing
                return None
            wrong = sides[0], sides[1]
        if drawn is None or np.isnan(values).any():
            reasons[path] = how.empty
            return None
        first, second = values
        interval = percentile_interval(drawn)
        figure: dict[str, Any] = {"a": first, "b": second, "difference": first - second}
        figure["interval"] = None if isinstance(interval, str) else interval
        if isinstance(interval, str):
            reasons[f"{path}.interval"] = interval
        if wrong is not None:
            figure["mcnemar"] = _mcnemar(*wrong, rows)
        return figure


def _mcnemar(
    a: tuple[NDArray[Any], Bools | None], b: tuple[NDArray[Any], Bools | None], rows: Bools
) -> dict[str, Any]:
    """The test on wrong flags [N] of the images that count for both sides."""
    for _, counted in (a, b):
        rows = rows if counted is None else rows & counted
    only_a, only_b = int((a[0] & ~b[0] & rows).sum()), int((b[0] & ~a[0] & rows).sum())
    return {"only_a_wrong": only_a, "only_b_wrong": only_b, "p": mcnemar_p(only_a, only_b)}


def _sentence(a: str, b: str, where: str, figure: Mapping[str, Any] | None) -> str | None:
    """The conclusion on one error: one side errs less only where test and interval agree."""
    if figure is None:
        return None
    difference, interval, p = figure["difference"], figure["interval"], figure["mcnemar"]["p"]
    differs = interval is not None and (interval[0] > 0 or interval[1] < 0) and p < _ALPHA
    # The difference is printed as the first one's advantage.
    better, worse, sign = (a, b, -1) if difference <= 0 else (b, a, 1)
    points = f"difference {100 * abs(difference):.2f} points"
    if interval is None:
        points += ", no interval"
    else:
        low, high = sorted(sign * 100 * bound for bound in interval)
        points += f", 95 % interval {low:.2f} to {high:.2f}"
    points += f"; McNemar p = {p:.2g}"
    if differs:
        return f"{better} errs less than {worse} {where} ({points})."
    return f"{better} and {worse} do not differ significantly {where} ({points})."


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison as plain text for a terminal of 100 columns."""
    metrics = shown_in(_compared)
    overall = [
        _row(title, comparison["overall"][metric.key])
        for metric, title in metrics
        if comparison["overall"][metric.key] is not None
    ]
    lines = [
        f"A: {comparison['a']['name']}",
        f"B: {comparison['b']['name']}",
        f"{comparison['images']} images; intervals over {comparison['resampled']}; figures in per cent, "
        "differences in points",
        "",
        text_table(overall, ("", "A", "B", "A - B", "95 % interval", "McNemar p"), align="lrrrll"),
    ]
    for metric, title in metrics:
        rows = [
            _row(name, values[metric.key])
            for name, values in comparison["per_generator"].items()
            if values.get(metric.key) is not None
        ]
        if rows and metric.by_generator:
            lines += ["", f"{title}, by generator", text_table(rows, align="lrrrll")]
    if comparison["sentence"] is None:
        lines += ["", f"real against fake is not compared: {comparison['reasons']['sentence']}"]
    lines += [""] + [sentence for sentence in comparison["sentences"].values() if sentence is not None]
    return "\n".join(lines)


def _row(title: str, figure: Mapping[str, Any]) -> tuple[str, ...]:
    interval = figure["interval"]
    low_high = "-" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
    figures = [f"{100 * figure[key]:.2f}" for key in ("a", "b", "difference")]
    p = f"{figure['mcnemar']['p']:.2g}" if "mcnemar" in figure else ""
    return title[:40], *figures, low_high, p
