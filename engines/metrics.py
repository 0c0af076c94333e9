"""Metrics as a pure function of the predictions table.

Everything is a fraction. A metric that cannot be computed (no fakes, no known object) is
null, and `reasons` says why. Formulas are scikit-learn's: errors are `zero_one_loss`,
AUROC `roc_auc_score`, AP `average_precision_score` (the step-wise sum, not interpolated),
with fake as the positive class and P(fake) as the score.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score, zero_one_loss

from engines.predictions import TOP, checkpoint_info, label_indices, label_spaces

SCHEMA, VERSION = "telltale-metrics", 1
THRESHOLD = 0.5  # an image is called fake where P(fake) is at least this
MERGED = ("stable_diffusion_1_4", "stable_diffusion_1_5")
_NO_IMAGES = "no images"
_NO_OBJECTS = "no image with a known object"


class _Labels:
    """The table's columns as arrays of N rows; labels are positions in the label spaces."""

    def __init__(self, table: pa.Table) -> None:
        self.generators, self.objects = label_spaces(table)
        self.generator = label_indices(table, "generator", self.generators)
        self.generator_pred = label_indices(table, "generator_pred", self.generators)
        self.object = label_indices(table, "object", self.objects)
        self.object_pred = label_indices(table, "object_pred", self.objects)
        self.p_fake: NDArray[np.float64] = table["p_fake"].to_numpy()
        self.fake = self.generator != 0
        self.known = self.object >= 0
        self.called_fake = self.p_fake >= THRESHOLD
        self.in_top5 = self._in_top5(table)

    def _in_top5(self, table: pa.Table) -> NDArray[np.bool_]:
        column = table["object_top5"].combine_chunks()
        rows = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy())
        flat = pa.table({"name": column.flatten()})
        hits = (label_indices(flat, "name", self.objects) == self.object[rows]) & self.known[rows]
        return np.bincount(rows[hits], minlength=len(column)) > 0

    def merged(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Generator labels with the second of `MERGED` renamed to the first."""
        first, second = (self.generators.index(name) for name in MERGED)
        return np.where(labels == second, first, labels)


class _Section:
    """One part of metrics.json; a value that cannot be computed leaves its reason."""

    def __init__(self, name: str, reasons: dict[str, str]) -> None:
        self.values: dict[str, Any] = {}
        self._name, self._reasons = name, reasons

    def null(self, key: str, reason: str) -> None:
        self.values[key] = None
        self._reasons[f"{self._name}.{key}"] = reason

    def error(self, key: str, true: NDArray[Any], predicted: NDArray[Any], empty: str = _NO_IMAGES) -> None:
        """The share of rows in which two arrays [n] differ."""
        if len(true):
            self.values[key] = float(zero_one_loss(true, predicted))
        else:
            self.null(key, empty)

    def ranking(self, fake: NDArray[np.bool_], p_fake: NDArray[np.float64], names: tuple[str, str]) -> None:
        """AUROC and AP of p_fake [n] for telling fake [n] from real; `names` of (fakes, reals)."""
        missing = [name for name, there in zip(names, (fake.any(), (~fake).any()), strict=True) if not there]
        for key, formula in (("auroc", roc_auc_score), ("ap", average_precision_score)):
            if missing:
                self.null(key, f"no images of {' and '.join(missing)}")
            else:
                # The sum behind AP can round to a little above 1.
                self.values[key] = min(1.0, float(formula(fake, p_fake)))


def compute_metrics(table: pa.Table) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        table: as from `build_table` or `read_predictions`; any subset of its rows will do.

    Returns:
        plain JSON values: schema, version, checkpoint, threshold, counts, overall,
        per_generator, confusion (rows are true labels, columns predicted) and reasons.
        `generator_error_sd_merged` does not count Stable Diffusion 1.4 taken for 1.5 or
        the reverse. `real_fake_error` calls an image fake where P(fake) >= 0.5,
        `real_fake_error_argmax` where the likeliest generator is not nature (as the
        reference project counts). `joint_error`: generator or object wrong, over images
        of known object.
    """
    t = _Labels(table)
    reasons: dict[str, str] = {}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "checkpoint": checkpoint_info(table),
        "threshold": THRESHOLD,
        "counts": _counts(t),
        "overall": _overall(t, reasons),
        "per_generator": {name: _one_generator(t, index, reasons) for index, name in enumerate(t.generators)},
        "confusion": {
            "generator": _confusion(t.generators, t.generator, t.generator_pred),
            "real_fake": _confusion(("real", "fake"), t.fake.astype(int), t.called_fake.astype(int)),
        },
        "reasons": reasons,
    }


def _counts(t: _Labels) -> dict[str, Any]:
    per_generator = np.bincount(t.generator, minlength=len(t.generators))
    return {
        "images": len(t.fake),
        "real": int((~t.fake).sum()),
        "fake": int(t.fake.sum()),
        "object_known": int(t.known.sum()),
        "object_known_nature": int((t.known & ~t.fake).sum()),
        "generators": dict(zip(t.generators, per_generator.tolist(), strict=True)),
    }


def _overall(t: _Labels, reasons: dict[str, str]) -> dict[str, Any]:
    s = _Section("overall", reasons)
    s.error("generator_error", t.generator, t.generator_pred)
    if all(name in t.generators for name in MERGED):
        s.error("generator_error_sd_merged", t.merged(t.generator), t.merged(t.generator_pred))
    else:
        s.null("generator_error_sd_merged", f"the label space has not both of {' and '.join(MERGED)}")
    s.error("real_fake_error", t.fake, t.called_fake)
    s.error("real_fake_error_argmax", t.fake, t.generator_pred != 0)

    known = t.known
    s.error("object_error", t.object[known], t.object_pred[known], _NO_OBJECTS)
    nature = known & ~t.fake
    s.error(
        "object_error_nature", t.object[nature], t.object_pred[nature], "no photograph with a known object"
    )
    if len(t.objects) > TOP:
        s.error("object_top5_error", known[known], t.in_top5[known], _NO_OBJECTS)
    else:
        s.null("object_top5_error", f"the label space has no more than {TOP} objects")
    right = (t.generator == t.generator_pred) & (t.object == t.object_pred)
    s.error("joint_error", known[known], right[known], _NO_OBJECTS)

    s.ranking(t.fake, t.p_fake, ("any generator", "nature"))
    for key, rows, empty in (
        ("accuracy_real", ~t.fake, "no images of nature"),
        ("accuracy_fake", t.fake, "no images of any generator"),
    ):
        if rows.any():
            s.values[key] = float(np.mean(t.called_fake[rows] == t.fake[rows]))
        else:
            s.null(key, empty)
    return s.values


def _one_generator(t: _Labels, index: int, reasons: dict[str, str]) -> dict[str, Any]:
    """Errors on one generator's images; AUROC and AP of them against all photographs."""
    name = t.generators[index]
    s = _Section(f"per_generator.{name}", reasons)
    own = t.generator == index
    known = own & t.known
    s.values["n"] = int(own.sum())
    s.error("generator_error", t.generator[own], t.generator_pred[own])
    s.error("real_fake_error", t.fake[own], t.called_fake[own])
    s.error("object_error", t.object[known], t.object_pred[known], _NO_OBJECTS)
    if index == 0:
        for key in ("auroc", "ap"):
            s.null(key, "nature is what the others are told from")
    else:
        rows = own | ~t.fake
        s.ranking(t.fake[rows], t.p_fake[rows], (name, "nature"))
    return s.values


def _confusion(labels: tuple[str, ...], true: NDArray[Any], predicted: NDArray[Any]) -> dict[str, Any]:
    size = len(labels)
    # scikit-learn refuses an empty table.
    matrix = (
        confusion_matrix(true, predicted, labels=range(size)) if len(true) else np.zeros((size, size), int)
    )
    return {"labels": list(labels), "matrix": matrix.tolist()}


def format_table(metrics: dict[str, Any]) -> str:
    """The metrics as plain text for a terminal: errors in per cent, with counts."""
    overall, counts = metrics["overall"], metrics["counts"]
    images, known = counts["images"], counts["object_known"]
    rows = (
        ("generator", "generator_error", images),
        ("generator, SD 1.4 and 1.5 as one", "generator_error_sd_merged", images),
        ("real/fake, P(fake) >= 0.5", "real_fake_error", images),
        ("real/fake, likeliest generator", "real_fake_error_argmax", images),
        ("object", "object_error", known),
        ("object, photographs only", "object_error_nature", counts["object_known_nature"]),
        ("object not in the top 5", "object_top5_error", known),
        ("generator or object", "joint_error", known),
    )
    lines = [f"{images} images: {counts['real']} real, {counts['fake']} fake; {known} of known object", ""]
    lines.append(f"{'':34}{'error':>9}  wrong of all")
    for title, key, total in rows:
        if overall[key] is not None:
            lines.append(f"{title:34}{_percent(overall[key]):>9}  {round(overall[key] * total)} of {total}")
    scores = (("AUROC", _score(overall["auroc"])), ("AP", _score(overall["ap"])))
    shares = (("real", "accuracy_real"), ("fake", "accuracy_fake"))
    lines += ["", "real/fake: " + ", ".join(f"{name} {value}" for name, value in scores)]
    lines[-1] += "; accuracy on " + ", ".join(f"{name} {_percent(overall[key])}" for name, key in shares)
    width = max(10, *(len(name) for name in metrics["per_generator"]))
    heads = ("images", "generator", "real/fake", "object", "AUROC", "AP")
    lines += ["", f"{'errors on':{width}}" + "".join(f"{head:>11}" for head in heads)]
    for name, values in metrics["per_generator"].items():
        if values["n"] == 0:
            continue
        errors = [_percent(values[f"{key}_error"]) for key in ("generator", "real_fake", "object")]
        cells = [str(values["n"]), *errors, _score(values["auroc"]), _score(values["ap"])]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
