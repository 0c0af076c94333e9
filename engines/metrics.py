"""Errors and ranking metrics as pure functions of the predictions table.

Errors are fractions in [0, 1]. A metric that cannot be computed is None, and `reasons`
says why: never 0, never a crash. Formulas of ranking metrics are scikit-learn's.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from engines.predictions import Predictions

SCHEMA, VERSION = "telltale-metrics", 1
_SD = ("stable_diffusion_1_4", "stable_diffusion_1_5")

Bools = NDArray[np.bool_]


def _share(wrong: Bools) -> float | None:
    return float(wrong.mean()) if len(wrong) else None


def compute_metrics(predictions: Predictions) -> dict[str, Any]:
    """Everything metrics.json holds.

    Definitions: generator_error, the generator head's argmax is not the truth;
    generator_error_sd_merged, the same with SD 1.4 and 1.5 as one; real_fake_error,
    (P(fake) >= 0.5) is not whether the image is fake; real_fake_error_argmax, as the
    reference counts: whether the argmax is "nature" decides; object_error and joint_error
    over images of known object (joint: generator or object wrong).
    """
    reasons: dict[str, str] = {}
    table = predictions.table
    facts = _Facts(predictions)
    overall = _overall(predictions, facts, reasons)
    nature = table["generator"].to_numpy() == predictions.generators[0]
    per_generator = {}
    for name in predictions.generators:
        own = table["generator"].to_numpy() == name
        if not own.any():
            continue
        entry: dict[str, Any] = {
            "images": int(own.sum()),
            "generator_error": _share(facts.generator_wrong[own]),
            "real_fake_error": _share(facts.real_fake_wrong[own]),
            "object_error": _share(facts.object_wrong[own & facts.known]),
        }
        if name != predictions.generators[0]:
            where = own | nature
            entry |= _ranking(facts.p_fake[where], ~nature[where], f"per_generator.{name}", reasons)
        per_generator[name] = entry
    names = list(predictions.generators)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "checkpoint": predictions.checkpoint,
        "counts": {
            "images": len(table),
            "real": int(nature.sum()),
            "fake": int((~nature).sum()),
            "object_known": int(facts.known.sum()),
        },
        "overall": overall,
        "per_generator": per_generator,
        "confusion": {
            "generator": {
                "labels": names,
                "matrix": confusion_matrix(table["generator"], table["generator_pred"], labels=names).tolist(),
            },
            "real_fake": {
                "labels": ["real", "fake"],
                "matrix": confusion_matrix(~nature, facts.p_fake >= 0.5, labels=[False, True]).tolist(),
            },
        },
        "reasons": reasons,
    }


class _Facts:
    """Right and wrong, image by image."""

    def __init__(self, predictions: Predictions) -> None:
        table = predictions.table
        truth, answer = table["generator"].to_numpy(), table["generator_pred"].to_numpy()
        nature = predictions.generators[0]
        self.p_fake = table["p_fake"].to_numpy(np.float64)
        self.fake: Bools = truth != nature
        self.known: Bools = table["object"].notna().to_numpy()
        self.generator_wrong: Bools = truth != answer
        both_sd = np.isin(truth, _SD) & np.isin(answer, _SD)
        self.merged_wrong: Bools = self.generator_wrong & ~both_sd
        self.real_fake_wrong: Bools = (self.p_fake >= 0.5) != self.fake
        self.argmax_wrong: Bools = (answer != nature) != self.fake
        objects = table["object"].to_numpy()
        self.object_wrong: Bools = self.known & (objects != table["object_pred"].to_numpy())
        top5 = table["object_top5"].to_numpy()
        self.top5_wrong: Bools = np.array(
            [known and truth not in set(answers) for known, truth, answers in zip(self.known, objects, top5, strict=True)]
        )


def _overall(predictions: Predictions, facts: _Facts, reasons: dict[str, str]) -> dict[str, Any]:
    known, fake = facts.known, facts.fake
    overall: dict[str, Any] = {
        "generator_error": _share(facts.generator_wrong),
        "generator_error_sd_merged": _share(facts.merged_wrong),
        "real_fake_error": _share(facts.real_fake_wrong),
        "real_fake_error_argmax": _share(facts.argmax_wrong),
        "accuracy_real": _minus(_share(facts.real_fake_wrong[~fake])),
        "accuracy_fake": _minus(_share(facts.real_fake_wrong[fake])),
        "object_error": _share(facts.object_wrong[known]),
        "object_error_nature": _share(facts.object_wrong[known & ~fake]),
        "object_error_fake": _share(facts.object_wrong[known & fake]),
        "object_top5_error": _share(facts.top5_wrong[known]),
        "joint_error": _share((facts.generator_wrong | facts.object_wrong)[known]),
    }
    overall |= _ranking(facts.p_fake, fake, "overall", reasons)
    for name, value in overall.items():
        if value is None and f"overall.{name}" not in reasons:
            reasons[f"overall.{name}"] = "no image it could be counted on"
    return overall


def _minus(error: float | None) -> float | None:
    return None if error is None else 1 - error


def _ranking(p_fake: NDArray[np.float64], fake: Bools, where: str, reasons: dict[str, str]) -> dict[str, float | None]:
    if fake.all() or not fake.any():
        missing = "photographs" if fake.all() else "fakes"
        for name in ("auroc", "ap"):
            reasons[f"{where}.{name}"] = f"there are no {missing} to rank against"
        return {"auroc": None, "ap": None}
    return {"auroc": float(roc_auc_score(fake, p_fake)), "ap": float(average_precision_score(fake, p_fake))}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def format_table(metrics: dict[str, Any]) -> str:
    """The errors as a plain-text table for the terminal."""
    overall, counts = metrics["overall"], metrics["counts"]
    lines = [f"{counts['images']} images: {counts['real']} real, {counts['fake']} generated", ""]
    for title, name in (
        ("generator error", "generator_error"),
        ("  SD 1.4 and 1.5 as one", "generator_error_sd_merged"),
        ("real/fake error", "real_fake_error"),
        ("object error", "object_error"),
        ("generator or object wrong", "joint_error"),
    ):
        lines.append(f"{title:28}{_percent(overall[name]):>10}")
    auroc = overall["auroc"]
    lines.append(f"{'real/fake AUROC':28}{'-' if auroc is None else f'{auroc:.4f}':>10}")
    lines += ["", f"{'source':24}{'images':>8}{'generator':>12}{'real/fake':>12}{'object':>12}"]
    for name, entry in metrics["per_generator"].items():
        errors = (entry["generator_error"], entry["real_fake_error"], entry["object_error"])
        lines.append(f"{name:24}{entry['images']:>8}" + "".join(f"{_percent(e):>12}" for e in errors))
    return "\n".join(lines)
