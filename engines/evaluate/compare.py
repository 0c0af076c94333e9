"""Two detectors on the same images: paired differences, and what may honestly be said of them.

Differences are A's figure minus B's. Intervals are the paired bootstrap's: every resample
has the same images (or groups of images) for both. The exact McNemar test looks at the
images that only one of the two gets wrong; it takes images for independent, so where they
share groups the interval is the stricter judge.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataio.core import atomic
from dataio.core.errors import UserError, reason_of
from engines.evaluate.columns import Labels
from engines.evaluate.evaluate import PREDICTIONS
from engines.evaluate.intervals import Headline, sample_of
from engines.evaluate.predictions import checkpoint_info, read_predictions
from engines.evaluate.sections import NO_CALIBRATION, NO_IMAGES, NO_OBJECTS
from engines.stats.bootstrap import LEVEL, Figures, percentile_interval, resample
from engines.stats.scores import Bools, Floats
from engines.stats.significance import mcnemar_p

SCHEMA, VERSION = "telltale-comparison", 1
RESAMPLES, SEED = 2000, 0
ALPHA = 1 - LEVEL
METHOD = "paired percentile bootstrap, seeded, of images within each true generator, or of whole groups"
ERRORS = {
    "real_fake_error": "real/fake at P(fake) >= 0.5",
    "real_fake_error_calibrated": "real/fake at each one's frozen threshold",
    "generator_error": "naming the generator",
    "object_error": "naming the object",
}
_RANKED = ("balanced_accuracy", "auroc", "ap", "tpr_at_fpr_1", "tpr_at_fpr_5")


@dataclass(frozen=True)
class Side:
    """One of the two: its name for sentences and its table."""

    name: str
    table: pa.Table


def predictions_file(path: str | Path) -> Path:
    """The file of predictions that a folder of evaluate.py or a path itself means."""
    return Path(path) / PREDICTIONS if Path(path).is_dir() else Path(path)


def compare_evaluations(
    a: str, b: str, *, output: str | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Compare two evaluations by path, and write the comparison to `output`.

    Raises:
        UserError: see `read_predictions` and `compare`; the output cannot be written, which is
            found before anything is computed.
    """
    if output is not None:
        folder = Path(output).absolute().parent
        if Path(output).is_dir() or not folder.is_dir():
            raise UserError(
                f"--output {output}: expected a file in a folder that exists; choose another, such as "
                "comparison.json"
            )
    sides = [Side(path, read_predictions(predictions_file(path))) for path in (a, b)]
    found = compare(*sides, resamples=resamples, seed=seed)
    if output is not None:
        try:
            atomic.write_text(Path(output), json.dumps(found, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"--output {output}: cannot be written ({reason_of(error)}); choose another file"
            ) from None
    return found


def compare(a: Side, b: Side, *, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """The comparison of two tables of predictions of the same images, as plain JSON values.

    Returns:
        schema, version, a, b (name and checkpoint), images, groups, level, method, resamples,
        seed, resampled ("images" or "groups"), overall and per_generator (by figure: a, b,
        difference = a - b, interval of the difference and, for errors, mcnemar), sentences
        (by error), sentence (the one to write) and reasons of what is null.

    Raises:
        UserError: other images in one than in the other, or a damaged calibration.
    """
    pair = _Pair(a, b, resamples, seed)
    reasons: dict[str, str] = {} if pair.grouped else {"groups": "no two images share a group"}
    overall = pair.figures(None, reasons)
    per_generator = {
        name: {"n": int((pair.a.generator == index).sum()), **pair.figures(index, reasons)}
        for index, name in enumerate(pair.a.generators)
    }
    sentences = {}
    for key in ERRORS:
        sentences[key] = _sentence(a.name, b.name, len(pair.sample), key, overall[key])
        if sentences[key] is None:
            reasons[f"sentences.{key}"] = reasons[f"overall.{key}"]
    sentence = sentences["real_fake_error_calibrated"] or sentences["real_fake_error"]
    if sentence is None:
        reasons["sentence"] = NO_IMAGES
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "a": {"name": a.name, "checkpoint": checkpoint_info(a.table)},
        "b": {"name": b.name, "checkpoint": checkpoint_info(b.table)},
        "images": len(pair.sample),
        "groups": None if pair.sample.cluster is None else int(pair.sample.cluster.max()) + 1,
        "level": LEVEL,
        "method": METHOD,
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
    """Both sides' labels, figures and resampled differences, image by image alike."""

    def __init__(self, a: Side, b: Side, resamples: int, seed: int) -> None:
        left, right = (side.table.sort_by("sample_id") for side in (a, b))
        _check_same_images(Side(a.name, left), Side(b.name, right))
        self.a, self.b = Labels(left), Labels(right)
        # Either table may know the groups.
        self.a.cluster = self.b.cluster if self.a.cluster is None else self.a.cluster
        self.sample = sample_of(self.a)
        self.grouped = self.sample.cluster is not None
        self._headlines = (Headline(self.a, self.sample), Headline(self.b, self.sample))
        self._points = [headline(np.ones((1, len(self.sample)))) for headline in self._headlines]
        self._drawn = resample(
            self.sample, self._differences, resamples=resamples, seed=seed, grouped=self.grouped
        )
        self._wrong = {key: _wrong(key, self.a, self.b) for key in ERRORS}

    def _differences(self, weights: Floats) -> Figures:
        one, two = (headline(weights) for headline in self._headlines)
        return Figures(
            {key: one.overall[key] - two.overall[key] for key in one.overall if key in two.overall},
            {key: one.each[key] - two.each[key] for key in one.each if key in two.each},
        )

    def figures(self, index: int | None, reasons: dict[str, str]) -> dict[str, Any]:
        """Every figure of all images (`index` None) or of one generator; null ones leave reasons."""
        where = "overall" if index is None else f"per_generator.{self.a.generators[index]}"
        rows = np.ones(len(self.sample), bool) if index is None else self.a.generator == index
        # Nature is what the others are told from: it has errors only.
        keys = ERRORS if index == 0 else (*ERRORS, *_RANKED)
        found = {}
        for key in keys:
            if index is None:
                values = [float(p.overall[key][0]) if key in p.overall else np.nan for p in self._points]
                drawn = self._drawn.overall.get(key)
            else:
                values = [float(p.each[key][0, index]) if key in p.each else np.nan for p in self._points]
                drawn = self._drawn.each[key][:, index] if key in self._drawn.each else None
            found[key] = _figure(f"{where}.{key}", values, drawn, self._wrong.get(key), rows, reasons)
        return found


def _check_same_images(a: Side, b: Side) -> None:
    """Both tables sorted by sample id."""
    ids = [side.table["sample_id"].to_numpy() for side in (a, b)]
    odd = np.setxor1d(*ids)
    if len(odd):
        raise UserError(
            f"{b.name}: predictions of other images than {a.name} has ({len(odd)} samples in only one of "
            f"them, such as {odd[0]}); compare evaluations of the same split of the same shards"
        )
    for column in ("key", "generator", "object"):
        here, there = a.table[column].to_pylist(), b.table[column].to_pylist()
        row = next((i for i, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1]), None)
        if row is not None:
            raise UserError(
                f"{b.name}: predictions of other images than {a.name} has (sample {ids[0][row]} has {column} "
                f"{there[row]!r}, not {here[row]!r}); compare evaluations of the same split of the same shards"
            )


def _wrong(key: str, ta: Labels, tb: Labels) -> tuple[Bools, Bools, Bools] | str:
    """Which images A and B get wrong and which count, bool [N] each; or why that cannot be said."""
    if key == "real_fake_error_calibrated":
        if ta.called_fake_calibrated is None or tb.called_fake_calibrated is None:
            return NO_CALIBRATION
        called = (ta.called_fake_calibrated, tb.called_fake_calibrated)
        return called[0] != ta.fake, called[1] != ta.fake, np.ones(len(ta.fake), bool)
    if key == "real_fake_error":
        return ta.called_fake != ta.fake, tb.called_fake != ta.fake, np.ones(len(ta.fake), bool)
    if key == "generator_error":
        return ta.generator != ta.generator_pred, tb.generator != tb.generator_pred, ta.closed & tb.closed
    return ta.object != ta.object_pred, tb.object != tb.object_pred, ta.known & tb.known


def _figure(
    path: str,
    values: list[float],
    drawn: Floats | None,
    wrong: tuple[Bools, Bools, Bools] | str | None,
    rows: Bools,
    reasons: dict[str, str],
) -> dict[str, Any] | None:
    """One figure of both sides: `values` [2], `drawn` differences [B], `wrong` for errors."""
    if isinstance(wrong, str):
        reasons[path] = wrong
        return None
    if drawn is None or np.isnan(values).any():
        reasons[path] = NO_OBJECTS if path.endswith("object_error") else NO_IMAGES
        return None
    first, second = values
    found: dict[str, Any] = {"a": first, "b": second, "difference": first - second}
    interval = percentile_interval(drawn)
    found["interval"] = None if isinstance(interval, str) else interval
    if isinstance(interval, str):
        reasons[f"{path}.interval"] = interval
    if wrong is not None:
        a, b = (side[rows & wrong[2]] for side in wrong[:2])
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        found["mcnemar"] = {
            "only_a_wrong": only_a,
            "only_b_wrong": only_b,
            "p": mcnemar_p(only_a, only_b),
        }
    return found


def _sentence(a: str, b: str, images: int, key: str, figure: Mapping[str, Any] | None) -> str | None:
    """What may be written of one error: that one errs less only where test and interval agree."""
    if figure is None:
        return None
    difference, interval, p = figure["difference"], figure["interval"], figure["mcnemar"]["p"]
    told = interval is not None and (interval[0] > 0 or interval[1] < 0) and p < ALPHA
    # The difference is printed as the first one's advantage.
    better, worse, sign = (a, b, -1) if difference <= 0 else (b, a, 1)
    points = f"difference {100 * abs(difference):.2f} points"
    if interval is None:
        points += ", no interval"
    else:
        low, high = sorted(sign * 100 * bound for bound in interval)
        points += f", 95 % interval {low:.2f} to {high:.2f}"
    points += f"; McNemar p = {p:.2g}"
    where = f"on {images} images, {ERRORS[key]}"
    if told:
        return f"{better} errs less than {worse} {where} ({points})."
    return f"{better} and {worse} are not told apart {where} ({points})."


def format_comparison(found: Mapping[str, Any]) -> str:
    """The comparison as plain text for a terminal of 100 columns."""
    lines = [f"A: {found['a']['name']}", f"B: {found['b']['name']}"]
    lines += [
        f"{found['images']} images; intervals over {found['resampled']}; figures in per cent, differences in points",
        "",
    ]
    lines.append(f"{'':36}{'A':>9}{'B':>9}{'A - B':>9}  {'95 % interval':20}McNemar p")
    for key, figure in found["overall"].items():
        if figure is not None:
            lines.append(_row(ERRORS.get(key, key.replace("_", " ")), figure))
    for key in ("real_fake_error", "real_fake_error_calibrated", "generator_error", "auroc"):
        rows = [
            _row(name, values[key])
            for name, values in found["per_generator"].items()
            if values.get(key) is not None
        ]
        if rows:
            lines += ["", f"{ERRORS.get(key, 'AUROC')}, by generator", *rows]
    lines += [""] + [sentence for sentence in found["sentences"].values() if sentence is not None]
    return "\n".join(lines)


def _row(title: str, figure: Mapping[str, Any]) -> str:
    interval = figure["interval"]
    shown = "-" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
    cells = "".join(f"{100 * figure[key]:9.2f}" for key in ("a", "b", "difference"))
    p = f"{figure['mcnemar']['p']:.2g}" if "mcnemar" in figure else ""
    return f"{title[:35]:36}{cells}  {shown:20}{p}".rstrip()
