"""Metrics as a pure function of the predictions table: the content of metrics.json.

Everything is a fraction, but NLL, which is in nats. A metric that cannot be computed (no
fakes, no known object) is null, and `reasons` says why. Formulas are scikit-learn's: errors
are `zero_one_loss`, AUROC `roc_auc_score`, AP `average_precision_score` (the step-wise sum,
not interpolated), with fake as the positive class and P(fake) as the score; those that
scikit-learn lacks are in `engines.stats.scores`. docs/metrics.md describes every key.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import sklearn
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from engines.evaluate.columns import MERGED, THRESHOLD, Labels
from engines.evaluate.intervals import AVERAGED, NO_GROUPS, RESAMPLES, SEED, compute_intervals
from engines.evaluate.metrics_text import format_table
from engines.evaluate.open_set import compute_open_set
from engines.evaluate.predictions import TOP, checkpoint_info
from engines.evaluate.sections import DETECTION, NO_CALIBRATION, NO_IMAGES, NO_OBJECTS, PROBABILITY, Section
from engines.stats.scores import Bools, best_threshold

__all__ = ["SCHEMA", "THRESHOLD", "VERSION", "compute_metrics", "format_table"]

SCHEMA, VERSION = "telltale-metrics", 2
_ANY = ("any generator", "nature")
_CLOSED = "not in the model's label space"
_ORACLE = (
    "the threshold that is best for these very images: no threshold chosen beforehand can do better, "
    "so this is an upper bound and no result"
)


def compute_metrics(
    table: pa.Table, *, resamples: int = RESAMPLES, seed: int = SEED, held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        table: as from `build_table` or `read_predictions`; any subset of its rows will do.
        resamples, seed: of the bootstrap.
        held_out: see `engines.evaluate.open_set.compute_open_set`.

    Returns:
        plain JSON values: schema, version, checkpoint, threshold, counts, overall,
        per_generator, per_object, over_generators, attribution, confusion (rows are true
        labels, columns predicted), oracle_upper_bound, open_set, intervals and
        reasons. `generator_error_sd_merged` does not count Stable Diffusion 1.4 taken for
        1.5 or the reverse. `real_fake_error` calls an image fake where P(fake) >= 0.5,
        `real_fake_error_argmax` where the likeliest generator is not nature (as the
        reference project counts). `joint_error`: generator or object wrong, over images
        of known object.

    Raises:
        UserError: a damaged calibration, or a held-out generator that the table does not know.
    """
    # A thousand objects have as many small tables, of which checking takes as long as computing.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        return _compute(table, resamples, seed, held_out)


def _compute(table: pa.Table, resamples: int, seed: int, held_out: Sequence[str]) -> dict[str, Any]:
    t = Labels(table)
    reasons: dict[str, str] = {}
    overall = _overall(t, reasons)
    per_generator = {name: _one_generator(t, index, reasons) for index, name in enumerate(t.generators)}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "checkpoint": checkpoint_info(table),
        "threshold": THRESHOLD,
        "counts": _counts(t, reasons),
        "overall": overall,
        "per_generator": per_generator,
        "per_object": _per_object(t, reasons),
        "over_generators": _over_generators(t, per_generator, reasons),
        "attribution": _attribution(t, reasons),
        "confusion": _confusions(t, reasons),
        "oracle_upper_bound": _oracle(t, reasons),
        "open_set": compute_open_set(table, reasons, held_out=held_out),
        "intervals": compute_intervals(t, overall, per_generator, reasons, resamples=resamples, seed=seed),
        "reasons": reasons,
    }


def _counts(t: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    if t.cluster is None:
        reasons["counts.groups"] = NO_GROUPS
    per_generator = np.bincount(t.generator, minlength=len(t.generators))
    return {
        "images": len(t.fake),
        "real": int((~t.fake).sum()),
        "fake": int(t.fake.sum()),
        "object_known": int(t.known.sum()),
        "object_known_nature": int((t.known & ~t.fake).sum()),
        "groups": None if t.cluster is None else len(np.unique(t.cluster)),
        "generators": dict(zip(t.generators, per_generator.tolist(), strict=True)),
    }


def _overall(t: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    s = Section("overall", reasons)
    closed = t.closed
    s.error("generator_error", t.generator[closed], t.generator_pred[closed])
    if t.can_merge:
        s.error(
            "generator_error_sd_merged", t.merged(t.generator[closed]), t.merged(t.generator_pred[closed])
        )
    else:
        s.null("generator_error_sd_merged", _cannot_merge())
    s.error("real_fake_error", t.fake, t.called_fake)
    s.error("real_fake_error_argmax", t.fake, t.generator_pred != 0)
    _objects(s, t)
    s.detection(t.fake, t.p_fake, THRESHOLD, _ANY)
    _calibrated(s, t)
    return s.values


def _cannot_merge() -> str:
    return f"the label space has not both of {' and '.join(MERGED)}"


def _objects(s: Section, t: Labels) -> None:
    """Object errors, top 1 and top 5, on all images, photographs and fakes; the joint error."""
    known = t.known
    for suffix, rows, empty in (
        ("", known, NO_OBJECTS),
        ("_nature", known & ~t.fake, "no photograph with a known object"),
        ("_fake", known & t.fake, "no fake with a known object"),
    ):
        s.error(f"object_error{suffix}", t.object[rows], t.object_pred[rows], empty)
        if len(t.objects) > TOP:
            s.error(f"object_top5_error{suffix}", known[rows], t.in_top5[rows], empty)
        else:
            s.null(f"object_top5_error{suffix}", f"the label space has no more than {TOP} objects")
    right = (t.generator == t.generator_pred) & (t.object == t.object_pred)
    rows = known & t.closed
    s.error("joint_error", known[rows], right[rows], NO_OBJECTS)


def _calibrated(s: Section, t: Labels) -> None:
    """What the frozen decision does: without abstaining, and with it."""
    if t.calibrated is None or t.called_fake_calibrated is None or t.unsure is None:
        names = ("false_alarm_rate", "detection_rate", *PROBABILITY)
        keys = ("real_fake_error", *names, "unsure_share", "real_fake_error_sure")
        s.nulls([f"{key}_calibrated" for key in keys], NO_CALIBRATION)
        return
    called, sure = t.called_fake_calibrated, ~t.unsure
    s.error("real_fake_error_calibrated", t.fake, called)
    s.share("false_alarm_rate_calibrated", called[~t.fake], f"no images of {_ANY[1]}")
    s.share("detection_rate_calibrated", called[t.fake], f"no images of {_ANY[0]}")
    s.probability(t.fake, t.calibrated, "_calibrated")
    s.share("unsure_share_calibrated", t.unsure, NO_IMAGES)
    s.error("real_fake_error_sure_calibrated", t.fake[sure], called[sure], "unsure of every image")


def _one_generator(t: Labels, index: int, reasons: dict[str, str]) -> dict[str, Any]:
    """Errors on one generator's images; figures of detection of them against all photographs."""
    name = t.generators[index]
    s = Section(f"per_generator.{name}", reasons)
    own = t.generator == index
    known = own & t.known
    s.values["n"] = int(own.sum())
    if index < len(t.space):
        s.error("generator_error", t.generator[own], t.generator_pred[own])
    else:
        s.null("generator_error", _CLOSED)
    s.error("real_fake_error", t.fake[own], t.called_fake[own])
    if t.called_fake_calibrated is None:
        s.null("real_fake_error_calibrated", NO_CALIBRATION)
    else:
        s.error("real_fake_error_calibrated", t.fake[own], t.called_fake_calibrated[own])
    s.error("object_error", t.object[known], t.object_pred[known], NO_OBJECTS)
    if index == 0:
        s.nulls(DETECTION, "nature is what the others are told from")
    elif not own.any():
        # Of photographs alone, whatever there is would be of nature and not of this generator.
        missing = [name] if (~t.fake).any() else [name, _ANY[1]]
        s.nulls(DETECTION, f"no images of {' and '.join(missing)}")
    else:
        rows = own | ~t.fake
        s.detection(t.fake[rows], t.p_fake[rows], THRESHOLD, (name, _ANY[1]))
    return s.values


def _per_object(t: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """Figures on the images of each object that occurs, in the label space's order."""
    found = {}
    order = np.argsort(t.object, kind="stable")
    edges = np.searchsorted(t.object[order], np.arange(len(t.objects) + 1))
    for index, name in enumerate(t.objects):
        rows = np.sort(order[edges[index] : edges[index + 1]])
        if not len(rows):
            continue
        s = Section(f"per_object.{name}", reasons)
        fake = t.fake[rows]
        s.values |= {"n": len(rows), "real": int((~fake).sum()), "fake": int(fake.sum())}
        s.error("object_error", t.object[rows], t.object_pred[rows])
        s.detection(fake, t.p_fake[rows], THRESHOLD, _ANY)
        found[name] = s.values
    return found


def _over_generators(
    t: Labels, per_generator: dict[str, dict[str, Any]], reasons: dict[str, str]
) -> dict[str, Any]:
    """Mean, standard deviation and worst of each figure over the generators that have it."""
    found = {}
    for key in AVERAGED:
        s = Section(f"over_generators.{key}", reasons)
        values = {name: per_generator[name][key] for name in t.generators[1:]}
        there = {name: value for name, value in values.items() if value is not None}
        s.values["n"] = len(there)
        if there:
            worst = (max if key.endswith("_error") else min)(there, key=lambda name: there[name])
            s.values["mean"] = float(np.mean(list(there.values())))
            s.values["worst"] = {"generator": worst, "value": there[worst]}
        else:
            s.nulls(("mean", "worst"), "no generator has a value")
        if len(there) > 1:
            s.values["std"] = float(np.std(list(there.values()), ddof=1))
        else:
            s.null("std", "fewer than 2 generators")
        found[key] = s.values
    return found


def _attribution(t: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """Naming the generator (nature is one), Stable Diffusion 1.4 and 1.5 apart and as one."""
    s = Section("attribution", reasons)
    true, predicted = t.generator[t.closed], t.generator_pred[t.closed]
    s.share("accuracy", true == predicted, NO_IMAGES)
    s.macro_f1("macro_f1", true, predicted)
    keys = ("accuracy_sd_merged", "macro_f1_sd_merged")
    if t.can_merge:
        true, predicted = t.merged(true), t.merged(predicted)
        s.share(keys[0], true == predicted, NO_IMAGES)
        s.macro_f1(keys[1], true, predicted)
    else:
        s.nulls(keys, _cannot_merge())
    return s.values


def _confusions(t: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    s = Section("confusion", reasons)
    real_fake = ("real", "fake")
    s.values["generator"] = _confusion(t.generators, t.generator, t.generator_pred)
    if t.can_merge:
        kept = [index for index, name in enumerate(t.generators) if name != MERGED[1]]
        names = ["stable_diffusion" if t.generators[i] == MERGED[0] else t.generators[i] for i in kept]
        true, predicted = (np.searchsorted(kept, t.merged(x)) for x in (t.generator, t.generator_pred))
        s.values["generator_sd_merged"] = _confusion(names, true, predicted)
    else:
        s.null("generator_sd_merged", _cannot_merge())
    s.values["real_fake"] = _confusion(real_fake, t.fake.astype(int), t.called_fake.astype(int))
    if t.called_fake_calibrated is None:
        s.null("real_fake_calibrated", NO_CALIBRATION)
    else:
        called = t.called_fake_calibrated.astype(int)
        s.values["real_fake_calibrated"] = _confusion(real_fake, t.fake.astype(int), called)
    return s.values


def _confusion(labels: Sequence[str], true: NDArray[Any], predicted: NDArray[Any]) -> dict[str, Any]:
    size = len(labels)
    # scikit-learn refuses an empty table.
    matrix = (
        confusion_matrix(true, predicted, labels=range(size)) if len(true) else np.zeros((size, size), int)
    )
    return {"labels": list(labels), "matrix": matrix.tolist()}


def _oracle(t: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """The threshold chosen on the test images themselves, overall and for each generator."""
    found: dict[str, Any] = {"note": _ORACLE, "overall": {}, "per_generator": {}}
    everything = np.ones(len(t.fake), bool)
    found["overall"] = _best(t, everything, _ANY, "oracle_upper_bound.overall", reasons)
    for index, name in enumerate(t.generators[1:], start=1):
        rows = (t.generator == index) | ~t.fake
        where = f"oracle_upper_bound.per_generator.{name}"
        found["per_generator"][name] = _best(t, rows, (name, _ANY[1]), where, reasons)
    return found


def _best(
    t: Labels, rows: Bools, names: tuple[str, str], where: str, reasons: dict[str, str]
) -> dict[str, Any]:
    s = Section(where, reasons)
    fake, p = t.fake[rows], t.p_fake[rows]
    missing = [name for name, there in zip(names, (fake.any(), (~fake).any()), strict=True) if not there]
    if missing:
        s.nulls(("accuracy", "threshold", "balanced_accuracy"), f"no images of {' and '.join(missing)}")
    else:
        s.values |= best_threshold(fake, p)
    return s.values
