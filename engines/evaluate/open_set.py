"""Open set: recognizing that an image comes from a generator never seen in training.

The score of rejection is 1 - the largest probability among the labels that were trained
(nature is one of them; Hendrycks and Gimpel, "A baseline for detecting misclassified
and out-of-distribution examples", 2017). Held-out generators are either true generators
that the model has no output for (`telltale.unseen` in the table), or names in its label
space that it was not trained on, as in leave-one-out training; their outputs are then never
an answer.

OSCR (Dhamija, Günther and Boult, "Reducing network agnostophobia", 2018) is the area under
the curve of the correct classification rate (the share of known images that are kept and
given the right label) over the false positive rate (the share of unknown images that are
kept), as the threshold on the score goes through all its values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from dataio.core.errors import UserError
from engines.evaluate.columns import Labels
from engines.evaluate.predictions import checkpoint_info, label_spaces, probabilities, unseen_generators
from engines.evaluate.sections.base import SectionValues, percent_text, score_text
from engines.stats.scores import Bools, Floats

SCORE = "1 - largest probability among trained labels (nature included)"


def held_out_of(table: pa.Table, held_out: Sequence[str] = ()) -> tuple[str, ...]:
    """The held-out generators of a table: named, from its checkpoint's description, or unseen.

    Raises:
        UserError: a name that is nature or that the table does not know.
    """
    generators, _ = label_spaces(table)
    unseen = unseen_generators(table)
    named = tuple(held_out) or tuple(checkpoint_info(table).get("held_out", ()))
    check_held_out(named, (*generators, *unseen))
    return tuple(name for name in (*generators, *unseen) if name in named or name in unseen)


def check_held_out(names: Sequence[str], generators: Sequence[str]) -> None:
    """Check that `names` may be held out of a label space that starts with nature.

    Raises:
        UserError: a name that is nature or not in the label space.
    """
    for name in names:
        if name not in generators[1:]:
            raise UserError(
                f"held-out generator {name!r}: expected some of [{', '.join(generators[1:])}]; "
                "name generators of the label space"
            )


def rejection(p: NDArray[np.floating], trained: Bools) -> tuple[Floats, NDArray[np.int64]]:
    """The score of rejection and the answer, from P(generator) float [N, G].

    Args:
        trained: bool [G], which outputs were trained; at least one.

    Returns:
        1 - max, float64 [N] in [0, 1], computed as the sum of the other probabilities, which
        stays precise where the maximum is almost 1; and the likeliest trained label, int64 [N].
    """
    p = np.asarray(p, np.float64)
    answer = np.where(trained, p, -1.0).argmax(1)
    others = p.copy()
    np.put_along_axis(others, answer[:, None], 0.0, axis=1)
    return np.clip(others.sum(1), 0.0, 1.0), answer


def oscr(known_score: Floats, known_right: Bools, unknown_score: Floats) -> float:
    """The area under correct classification rate over false positive rate.

    Args:
        known_score, unknown_score: of rejection, [K] and [U], both at least 1 long; an image
            is kept where its score is at most the threshold.
        known_right: bool [K], whether the answer is right.
    """
    thresholds = np.unique(np.concatenate([known_score, unknown_score]))
    right = np.searchsorted(np.sort(known_score[known_right]), thresholds, side="right")
    kept = np.searchsorted(np.sort(unknown_score), thresholds, side="right")
    correct = np.concatenate([[0.0], right / len(known_score)])
    false = np.concatenate([[0.0], kept / len(unknown_score)])
    return float(np.trapezoid(correct, false))


def compute_open_set(
    labels: Labels, reasons: dict[str, str], *, held_out: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The part `open_set` of metrics.json, a pure function of the predictions table.

    Args:
        reasons: receives the reason of each value that is null.
        held_out: generators that the model was not trained on; generators without an output are always held
            out; where none are given, those of the checkpoint's description are.

    Returns:
        held_out, score, counts known and unknown, closed_set_accuracy (of known images),
        auroc (unknown is positive), oscr, and and the latter two for each held-out generator.
        None where no generator is held out.

    Raises:
        UserError: see `held_out_of`.
    """
    names = held_out_of(labels.table, held_out)
    if not names:
        reasons["open_set"] = "no generator was held out"
        return None
    trained = np.array([name not in names for name in labels.space])
    unknown = np.isin(labels.generator, [labels.generators.index(name) for name in names])
    score, answer = rejection(probabilities(labels.table), trained)
    right = answer == labels.generator
    section = SectionValues("open_set", reasons)
    section.values |= {
        "held_out": list(names),
        "score": SCORE,
        "known": int((~unknown).sum()),
        "unknown": int(unknown.sum()),
    }
    section.share("closed_set_accuracy", right[~unknown], "no images of known generators")
    _against(section, score, right, ~unknown, unknown)
    section.values["per_generator"] = {}
    for name in names:
        rows = labels.generator == labels.generators.index(name)
        part = SectionValues(f"open_set.per_generator.{name}", reasons)
        part.values["n"] = int(rows.sum())
        _against(part, score, right, ~unknown, rows)
        section.values["per_generator"][name] = part.values
    return section.values


def open_set_lines(open_set: Mapping[str, Any]) -> list[str]:
    """The part `open_set` as lines for a terminal of 100 columns."""
    lines = [
        f"never seen: {', '.join(open_set['held_out'])} ({open_set['unknown']} images)",
        f"rejected with AUROC {score_text(open_set['auroc'])}, OSCR {score_text(open_set['oscr'])}; "
        f"known {open_set['known']} images, named right {percent_text(open_set['closed_set_accuracy'])}",
    ]
    return [line if len(line) <= 100 else line[:99] + "…" for line in lines]


def _against(section: SectionValues, score: Floats, right: Bools, known: Bools, unknown: Bools) -> None:
    missing = [
        f"{kind} generators" for kind, rows in (("known", known), ("held-out", unknown)) if not rows.any()
    ]
    if missing:
        section.nulls(("auroc", "oscr"), f"no images of {' and '.join(missing)}")
        return
    rows = known | unknown
    section.values["auroc"] = float(roc_auc_score(unknown[rows], score[rows]))
    section.values["oscr"] = oscr(score[known], right[known], score[unknown])
