"""Metrics as a pure function of the predictions table: the content of metrics.json.

Everything is a fraction, except NLL, which is in nats. A metric that cannot be computed (no
fakes, no known object) is null, and `reasons` says why. The formulas are scikit-learn's:
errors are `zero_one_loss`, AUROC `roc_auc_score`, AP `average_precision_score` (the step-wise
sum, not interpolated), with fake as the positive class and P(fake) as the score; those that
scikit-learn lacks are in `engines.stats.scores`. `engines.evaluate.sections` holds the metrics,
one family in each file; docs/metrics.md describes every key.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import sklearn

from engines.evaluate.columns import THRESHOLD, Labels
from engines.evaluate.intervals import DEFAULT_RESAMPLES, DEFAULT_SEED, NO_GROUPS, compute_intervals
from engines.evaluate.open_set import compute_open_set
from engines.evaluate.predictions import checkpoint_info, data_info, identities
from engines.evaluate.sections.base import SectionValues
from engines.evaluate.sections.registry import all_sections, averaged_keys

SCHEMA, VERSION = "telltale-metrics", 2


def compute_metrics(
    table: pa.Table,
    *,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = DEFAULT_SEED,
    held_out: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        table: from `build_table` or `read_predictions`; a subset of its rows is allowed.
        resamples, seed: of the bootstrap.
        held_out: see `engines.evaluate.open_set.compute_open_set`.

    Returns:
        plain JSON values: schema, version, checkpoint, data, threshold, counts, overall,
        per_generator, per_object, over_generators, attribution, confusion (rows are true
        labels, columns predicted), oracle_upper_bound, open_set, intervals and
        reasons. `generator_error_sd_merged` counts Stable Diffusion 1.4
        and 1.5 as one generator. `real_fake_error` calls an image fake where P(fake) >= 0.5,
        `real_fake_error_argmax` where the likeliest generator is not nature (as the
        reference project counts). `joint_error`: generator or object wrong, over images
        of known object.

    Raises:
        UserError: a damaged calibration, or a held-out generator that the table does not know.
    """
    # With a thousand objects, scikit-learn's checks take as long as its computations.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        return _compute(table, resamples, seed, held_out)


def _compute(table: pa.Table, resamples: int, seed: int, held_out: Sequence[str]) -> dict[str, Any]:
    labels = Labels(table)
    reasons: dict[str, str] = {}
    overall = _overall(labels, reasons)
    per_generator = {
        name: _one_generator(labels, index, reasons) for index, name in enumerate(labels.generators)
    }
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "checkpoint": checkpoint_info(table),
        "data": _data(table, reasons),
        "threshold": THRESHOLD,
        "counts": _counts(labels, reasons),
        "overall": overall,
        "per_generator": per_generator,
        "per_object": _per_object(labels, reasons),
        "over_generators": _over_generators(labels.generators[1:], per_generator, reasons),
        **_parts(labels, reasons),
        "open_set": compute_open_set(labels, reasons, held_out=held_out),
        "intervals": compute_intervals(
            labels, overall, per_generator, reasons, resamples=resamples, seed=seed
        ),
        "reasons": reasons,
    }


def _data(table: pa.Table, reasons: dict[str, str]) -> dict[str, Any] | None:
    """The description of the shards, with a digest of the images that the table holds."""
    described, column = data_info(table), identities(table)
    if not described:
        reasons["data"] = "the predictions do not describe the data they are of"
        return None
    if described.get("codec_equal") is None:
        reasons["data.codec_equal"] = "the checkpoint records no codec policy"
    digest = None
    if column is None:
        reasons["data.identities_sha256"] = "the predictions do not identify their images"
    else:
        digest = hashlib.sha256("\n".join(sorted(column.to_pylist())).encode()).hexdigest()
    return {**described, "identities_sha256": digest}


def _counts(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    if labels.cluster is None:
        reasons["counts.groups"] = NO_GROUPS
    per_generator = np.bincount(labels.generator, minlength=len(labels.generators))
    return {
        "images": len(labels.fake),
        "real": int((~labels.fake).sum()),
        "fake": int(labels.fake.sum()),
        "object_known": int(labels.known.sum()),
        "object_known_nature": int((labels.known & ~labels.fake).sum()),
        "groups": None if labels.cluster is None else len(np.unique(labels.cluster)),
        "generators": dict(zip(labels.generators, per_generator.tolist(), strict=True)),
    }


def _overall(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    values = SectionValues("overall", reasons)
    for section in all_sections():
        if section.overall is not None:
            section.overall(values, labels)
    return values.values


def _one_generator(labels: Labels, index: int, reasons: dict[str, str]) -> dict[str, Any]:
    """Errors on one generator's images; figures of detection of them against all photographs."""
    values = SectionValues(f"per_generator.{labels.generators[index]}", reasons)
    values.values["n"] = int((labels.generator == index).sum())
    for section in sorted(all_sections(), key=lambda s: s.generator_place or s.place):
        if section.per_generator is not None:
            section.per_generator(values, labels, index)
    return values.values


def _per_object(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """Figures on the images of each object that occurs, in the label space's order."""
    part = {}
    order = np.argsort(labels.object, kind="stable")
    edges = np.searchsorted(labels.object[order], np.arange(len(labels.objects) + 1))
    for index, name in enumerate(labels.objects):
        rows = np.sort(order[edges[index] : edges[index + 1]])
        if not len(rows):
            continue
        values = SectionValues(f"per_object.{name}", reasons)
        fake = int(labels.fake[rows].sum())
        values.values |= {"n": len(rows), "real": len(rows) - fake, "fake": fake}
        for section in all_sections():
            if section.per_object is not None:
                section.per_object(values, labels, rows)
        part[name] = values.values
    return part


def _over_generators(
    names: Sequence[str], per_generator: Mapping[str, Mapping[str, Any]], reasons: dict[str, str]
) -> dict[str, Any]:
    """Mean, standard deviation and worst of each figure over the generators that have it."""
    part = {}
    for key in averaged_keys():
        section = SectionValues(f"over_generators.{key}", reasons)
        values = {name: per_generator[name][key] for name in names if per_generator[name][key] is not None}
        section.values["n"] = len(values)
        if values:
            worst = (max if key.endswith("_error") else min)(values, key=lambda name: values[name])
            section.values["mean"] = float(np.mean(list(values.values())))
            section.values["worst"] = {"generator": worst, "value": values[worst]}
        else:
            section.nulls(("mean", "worst"), "no generator has a value")
        if len(values) > 1:
            section.values["std"] = float(np.std(list(values.values()), ddof=1))
        else:
            section.null("std", "fewer than 2 generators")
        part[key] = section.values
    return part


def _parts(labels: Labels, reasons: dict[str, str]) -> dict[str, Any]:
    """The parts of metrics.json that one section alone makes."""
    parts = [section.part for section in all_sections() if section.part is not None]
    return {name: compute(labels, reasons) for name, compute in parts}
