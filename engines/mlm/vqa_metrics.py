"""Metrics of a language model's answers: errors with intervals, and image-blind baselines.

A pure function of the answers. Errors are fractions of all items. An answer that states no
label or no option is a class of its own, "unparsed", and counts as wrong. Intervals are
Wilson's (SciPy's `binomtest(...).proportion_ci`); two models are compared by the exact McNemar
test (a binomial test of the items that only one of them answers correctly).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from dataio.core.errors import UserError
from dataio.vqa.blind_baselines import (
    LETTERS,
    MULTIPLE_CHOICE,
    OPEN,
    TRUE_FALSE,
    VqaItem,
    blind_scores,
    chance_of,
    kind_of,
    label_in_text,
    options_of,
)
from engines.stats.significance import mcnemar_p, wilson
from engines.stats.text_table import text_table

_SCHEMA, _VERSION = "telltale-vqa-metrics", 1
UNPARSED = "unparsed"
# Items of the reference's multiple-choice benchmark whose picture does not belong to their text.
WRONG_PICTURES = {
    "LUrHqwTCuBewTLK83nR4ax": "wrong picture in the reference's multiple-choice benchmark",
    "8LFozqHJ3VYeDaDaiRK2sW": "wrong picture in the reference's multiple-choice benchmark",
}
# A letter alone or before punctuation: "A cat" is not the answer A.
_LETTER = re.compile(
    r"\W*(?:(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\W+)?([A-D])\s*(?:$|[.:),;\]\n-]|because)",
    re.IGNORECASE,
)


def parse_answer(item: VqaItem) -> str:
    """The content of an answer: Real or Fake, a letter, an open answer's label, or "unparsed"."""
    answer = str(item.get("answer", "")).strip()
    if kind_of(item) == MULTIPLE_CHOICE:
        match = _LETTER.match(answer)
        letter = match.group(1).upper() if match else ""
        return letter if letter in options_of(item) else UNPARSED
    return label_in_text(answer) or UNPARSED


def true_label(item: VqaItem) -> str:
    """Real or Fake by an item's ground truth or metadata, or "" if unknown."""
    kind = kind_of(item)
    if kind == TRUE_FALSE:
        return str(item["ground_truth"])
    generator = str(item.get("metadata", {}).get("generator", ""))
    if generator:
        return "Real" if generator in ("natural", "nature") else "Fake"
    if kind == MULTIPLE_CHOICE:
        return label_in_text(options_of(item)[str(item["ground_truth"])], first=True)
    return label_in_text(str(item["ground_truth"]))


def answer_label(item: VqaItem) -> str:
    """The label that an answer states, in its words or by the option it chooses, or "unparsed"."""
    content = parse_answer(item)
    if kind_of(item) == MULTIPLE_CHOICE and content != UNPARSED:
        return label_in_text(options_of(item)[content], first=True) or UNPARSED
    return content


def is_right(item: VqaItem) -> bool:
    """Whether an answer is right. An open answer is if its label is; `text` measures its words."""
    if kind_of(item) == OPEN:
        return answer_label(item) == true_label(item)
    return parse_answer(item) == str(item["ground_truth"])


def defect_of(item: VqaItem) -> str:
    """Why an item should not count, or "" if it should."""
    return str(item.get("metadata", {}).get("defect", "") or WRONG_PICTURES.get(str(item.get("id")), ""))


def compute_vqa_metrics(
    items: Sequence[VqaItem],
    *,
    other: Sequence[VqaItem] | None = None,
    similarity: Callable[[list[str], list[str]], list[float]] | None = None,
) -> dict[str, Any]:
    """metrics.json of answered items of one kind.

    Args:
        items: with `answer`, and optionally `p_fake`.
        other: the same items answered by another model, for McNemar's test.
        similarity: returns the similarity of (answers, truths) in [-1, 1], for open items.

    Raises:
        UserError: no items, items of several kinds, or different items in `other`.
    """
    if not items:
        raise UserError("no items to score; expected a list of questions with answers")
    kinds = {kind_of(item) for item in items}
    if len(kinds) > 1:
        raise UserError(f"items of several kinds ({', '.join(sorted(kinds))}); score each kind by itself")
    kind = kinds.pop()
    right = np.asarray([is_right(item) for item in items])
    parsed = [parse_answer(item) for item in items]
    defects = {str(item["id"]): defect_of(item) for item in items if defect_of(item)}
    sound = np.asarray([not defect_of(item) for item in items])
    metrics: dict[str, Any] = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "kind": kind,
        "items": len(items),
        "error": float((~right).mean()),
        "error_interval_95": wilson(int((~right).sum()), len(items)),
        "error_excluding_defective": float((~right[sound]).mean()) if sound.any() else None,
        "defective": defects,
        "unparsed": parsed.count(UNPARSED),
        "chance_error": None if kind == OPEN else 1 - chance_of(items),
        "blind": {rule: 1 - score for rule, score in blind_scores(items).items()},
        "answers": {answer: parsed.count(answer) for answer in sorted(set(parsed))},
        "verdict": _real_fake_metrics(items),
        "per_generator": _per_generator(items, right),
    }
    if kind == MULTIPLE_CHOICE:
        metrics["truths"] = {letter: sum(i["ground_truth"] == letter for i in items) for letter in LETTERS}
    if kind == OPEN:
        metrics["text"] = _text(items, similarity)
    if other is not None:
        metrics["mcnemar"] = mcnemar(items, other)
    return metrics


def mcnemar(items: Sequence[VqaItem], other: Sequence[VqaItem]) -> dict[str, Any]:
    """Exact McNemar test of `items` against `other`, another model's answers to the same questions.

    Returns:
        fixed: wrong in `other`, right in `items`; broken: the converse; p: two-sided.

    Raises:
        UserError: the two hold different items.
    """
    before = {str(item["id"]): item for item in other}
    ids = {str(item["id"]) for item in items}
    if ids != set(before):
        different = sorted(ids ^ set(before))
        raise UserError(
            f"answers to other items ({len(different)} differ, such as {different[0]}); expected the same",
            field="compare",
        )
    for item in items:
        if item["question"] != before[str(item["id"])]["question"]:
            raise UserError(
                f"item {item['id']} asks another question there; expected the same benchmark",
                field="compare",
            )
    pairs = [(is_right(before[str(item["id"])]), is_right(item)) for item in items]
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    return {"fixed": fixed, "broken": broken, "p": mcnemar_p(fixed, broken)}


def _real_fake_metrics(items: Sequence[VqaItem]) -> dict[str, Any]:
    """Metrics of real against fake, for items of any kind."""
    known = [item for item in items if true_label(item)]
    if not known:
        return {"error": None, "reason": "no item says whether its image is real"}
    truth = [true_label(item) for item in known]
    predicted = [answer_label(item) for item in known]
    wrong = sum(a != b for a, b in zip(truth, predicted, strict=True))
    fake = np.asarray([t == "Fake" for t in truth])
    both = fake.any() and not fake.all()
    verdict: dict[str, Any] = {
        # Of one class, a constant answer would be right.
        "error": wrong / len(known) if both else None,
        **({} if both else {"reason": f"every image is {'fake' if fake.any() else 'real'}"}),
        "error_interval_95": wilson(wrong, len(known)) if both else None,
        "blind": {"always_fake": float((~fake).mean()), "always_real": float(fake.mean())},
        "unparsed": predicted.count(UNPARSED),
        "confusion": {
            f"{t}, called {s}": sum(x == t and y == s for x, y in zip(truth, predicted, strict=True))
            for t in ("Real", "Fake")
            for s in ("Real", "Fake", UNPARSED)
        },
    }
    scores = [item.get("p_fake") for item in known]
    if all(score is not None for score in scores):
        p = np.asarray(scores, float)
        verdict["error_at_half"] = float(((p >= 0.5) != fake).mean()) if both else None
        verdict["auroc"] = float(roc_auc_score(fake, p)) if both else None
        verdict["average_precision"] = float(average_precision_score(fake, p)) if both else None
    return verdict


def _per_generator(items: Sequence[VqaItem], right: np.ndarray) -> dict[str, dict[str, Any]]:
    indices: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        # The reference writes the same generator with a space and with an underscore.
        name = str(item.get("metadata", {}).get("generator", "unknown")).replace("_", " ")
        indices[name].append(index)
    return {
        name: {
            "items": len(rows),
            "error": float((~right[rows]).mean()),
            "error_interval_95": wilson(int((~right[rows]).sum()), len(rows)),
        }
        for name, rows in sorted(indices.items())
    }


def _text(
    items: Sequence[VqaItem], similarity: Callable[[list[str], list[str]], list[float]] | None
) -> dict[str, Any]:
    from torchmetrics.functional.text import rouge_score

    answers = [str(item.get("answer", "")) for item in items]
    truths = [str(item["ground_truth"]) for item in items]
    rouge = rouge_score(answers, truths, rouge_keys="rougeL")
    text: dict[str, Any] = {"rouge_l": float(rouge["rougeL_fmeasure"]), "similarity": None}
    if similarity is not None:
        text["similarity"] = float(np.mean(similarity(answers, truths)))
    else:
        text["reason"] = "no sentence encoder given"
    return text


def vqa_summary(metrics: Mapping[str, Any]) -> str:
    """The metrics as text tables for the terminal."""
    parts = [
        f"{metrics['kind'].replace('_', ' ')}: {metrics['items']} items",
        text_table(_summary_rows(metrics), align="lrl"),
    ]
    if metrics["chance_error"] is not None:
        parts.append(text_table(_baseline_rows(metrics), ["image-blind baseline", "error", ""], align="lrl"))
    per_generator = [
        [name, f"{part['error']:.2%}", _percent_range(part["error_interval_95"]), part["items"]]
        for name, part in metrics["per_generator"].items()
    ]
    parts.append(
        text_table(per_generator, ["generator", "error", "95 % interval", "items"], align="lrlr"),
    )
    if "mcnemar" in metrics:
        test = metrics["mcnemar"]
        parts.append(
            f"against the other model: {test['fixed']} fixed, {test['broken']} broken, "
            f"exact McNemar p = {test['p']:.3f}"
        )
    return "\n\n".join(parts)


def _percent_range(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:.1%} to {high:.1%}"


def _summary_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    interval = f"95 % interval {_percent_range(metrics['error_interval_95'])}"
    rows = [["error", f"{metrics['error']:.2%}", interval]]
    if metrics["defective"]:
        ids, reason = ", ".join(metrics["defective"]), next(iter(metrics["defective"].values()))
        rows.append(["without defective", f"{metrics['error_excluding_defective']:.2%}", f"{ids}: {reason}"])
    rows.append(["unparsed", str(metrics["unparsed"]), ""])
    label = metrics["verdict"]
    if label["error"] is not None and metrics["kind"] != TRUE_FALSE:
        baselines = ", ".join(
            f"{name.replace('_', ' ')} {error:.0%}" for name, error in label["blind"].items()
        )
        rows.append(["real or fake, error", f"{label['error']:.2%}", f"image-blind: {baselines}"])
    if label.get("auroc") is not None:
        rows.append(["AUROC of P(fake)", f"{label['auroc']:.4f}", ""])
    if "text" in metrics:
        rows.append(["ROUGE-L", f"{metrics['text']['rouge_l']:.4f}", ""])
        if metrics["text"]["similarity"] is not None:
            rows.append(["similarity", f"{metrics['text']['similarity']:.4f}", ""])
    return rows


def _baseline_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = [["chance", f"{metrics['chance_error']:.2%}", ""]]
    for baseline, error in metrics["blind"].items():
        beats = error < metrics["error_interval_95"][0]
        rows.append([baseline, f"{error:.2%}", "BEATS THE MODEL" if beats else ""])
    return rows
