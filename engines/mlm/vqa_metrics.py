"""What a language model's answers are worth: errors, with intervals and blind baselines.

A pure function of the answers. Errors are fractions over all items; an answer that names
no verdict or no option is its own class, "unparsed", and wrong: never guessed at. Intervals
are Wilson's (SciPy's `binomtest(...).proportion_ci`), the comparison of two models is the
exact McNemar test (a binomial test of the items that only one of them has right).
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

_SCHEMA, _VERSION = "telltale-vqa-metrics", 1
UNPARSED = "unparsed"
# Items of the reference's multiple-choice benchmark that show another picture than their text is about.
WRONG_PICTURES = {
    "LUrHqwTCuBewTLK83nR4ax": "wrong picture in the reference's multiple-choice benchmark",
    "8LFozqHJ3VYeDaDaiRK2sW": "wrong picture in the reference's multiple-choice benchmark",
}
# A letter alone or before punctuation: "A cat" is no answer A.
_LETTER = re.compile(
    r"\W*(?:(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\W+)?([A-D])\s*(?:$|[.:),;\]\n-]|because)",
    re.IGNORECASE,
)


def parse_answer(item: VqaItem) -> str:
    """What an answer says: Real or Fake, a letter, an open answer's verdict, or "unparsed"."""
    answer = str(item.get("answer", "")).strip()
    if kind_of(item) == MULTIPLE_CHOICE:
        found = _LETTER.match(answer)
        letter = found.group(1).upper() if found else ""
        return letter if letter in options_of(item) else UNPARSED
    return label_in_text(answer) or UNPARSED


def true_label(item: VqaItem) -> str:
    """Real or Fake where an item's truth or metadata say, else ""."""
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
    """The verdict of an answer: of the option it chose, of its words, or "unparsed"."""
    said = parse_answer(item)
    if kind_of(item) == MULTIPLE_CHOICE and said != UNPARSED:
        return label_in_text(options_of(item)[said], first=True) or UNPARSED
    return said


def is_right(item: VqaItem) -> bool:
    """Open answers are right where their verdict is; their words are measured apart."""
    if kind_of(item) == OPEN:
        return answer_label(item) == true_label(item)
    return parse_answer(item) == str(item["ground_truth"])


def defect_of(item: VqaItem) -> str:
    """Why an item should not count, or ""."""
    return str(item.get("metadata", {}).get("defect", "") or WRONG_PICTURES.get(str(item.get("id")), ""))


def compute_vqa_metrics(
    items: Sequence[VqaItem],
    *,
    other: Sequence[VqaItem] | None = None,
    similarity: Callable[[list[str], list[str]], list[float]] | None = None,
) -> dict[str, Any]:
    """metrics.json of answered items of one kind.

    Args:
        items: with `answer`, and `p_fake` where a model gave one.
        other: the same items answered by another model, for McNemar's test.
        similarity: gives the similarity of (answers, truths), each -1..1, for open items.

    Raises:
        UserError: no items, items of several kinds, or others than `other`'s.
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
        "answers": {said: parsed.count(said) for said in sorted(set(parsed))},
        "verdict": _verdict(items),
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
    """Exact McNemar test of `items` against `other`, the same questions answered before.

    Returns:
        fixed: wrong in `other`, right here; broken: the other way; p: two-sided.
    """
    before = {str(item["id"]): item for item in other}
    mine = {str(item["id"]) for item in items}
    if mine != set(before):
        odd = sorted(mine ^ set(before))
        raise UserError(
            f"--compare: answers to other items ({len(odd)} differ, such as {odd[0]}); expected the same"
        )
    for item in items:
        if item["question"] != before[str(item["id"])]["question"]:
            raise UserError(
                f"--compare: item {item['id']} asks another question there; expected the same benchmark"
            )
    pairs = [(is_right(before[str(item["id"])]), is_right(item)) for item in items]
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    return {"fixed": fixed, "broken": broken, "p": mcnemar_p(fixed, broken)}


def _verdict(items: Sequence[VqaItem]) -> dict[str, Any]:
    """Real against fake, whatever else an item asks."""
    known = [item for item in items if true_label(item)]
    if not known:
        return {"error": None, "reason": "no item says whether its image is real"}
    truth = [true_label(item) for item in known]
    said = [answer_label(item) for item in known]
    wrong = sum(a != b for a, b in zip(truth, said, strict=True))
    fake = np.asarray([t == "Fake" for t in truth])
    verdict: dict[str, Any] = {
        "error": wrong / len(known),
        "error_interval_95": wilson(wrong, len(known)),
        "blind": {"always_fake": float((~fake).mean()), "always_real": float(fake.mean())},
        "unparsed": said.count(UNPARSED),
        "confusion": {
            f"{t}, called {s}": sum(x == t and y == s for x, y in zip(truth, said, strict=True))
            for t in ("Real", "Fake")
            for s in ("Real", "Fake", UNPARSED)
        },
    }
    scores = [item.get("p_fake") for item in known]
    if all(score is not None for score in scores):
        p = np.asarray(scores, float)
        verdict["error_at_half"] = float(((p >= 0.5) != fake).mean())
        both = fake.any() and not fake.all()
        verdict["auroc"] = float(roc_auc_score(fake, p)) if both else None
        verdict["average_precision"] = float(average_precision_score(fake, p)) if both else None
    return verdict


def _per_generator(items: Sequence[VqaItem], right: np.ndarray) -> dict[str, dict[str, Any]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        # The reference writes one generator both ways.
        name = str(item.get("metadata", {}).get("generator", "unknown")).replace("_", " ")
        places[name].append(place)
    return {
        name: {
            "items": len(rows),
            "error": float((~right[rows]).mean()),
            "error_interval_95": wilson(int((~right[rows]).sum()), len(rows)),
        }
        for name, rows in sorted(places.items())
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
        text["reason"] = "no sentence encoder given (--encoder FOLDER)"
    return text


def vqa_summary(metrics: Mapping[str, Any]) -> str:
    """The metrics as a table for the screen."""
    low_error, high_error = metrics["error_interval_95"]
    lines = [
        f"{metrics['kind'].replace('_', ' ')}: {metrics['items']} items",
        f"error                  {metrics['error']:7.2%}   95 % interval {low_error:.1%} to {high_error:.1%}",
    ]
    if metrics["defective"]:
        told, why = ", ".join(metrics["defective"]), next(iter(metrics["defective"].values()))
        lines.append(f"without defective      {metrics['error_excluding_defective']:7.2%}   {told}: {why}")
    lines.append(f"unparsed               {metrics['unparsed']:7d}")
    verdict = metrics["verdict"]
    if verdict["error"] is not None and metrics["kind"] != TRUE_FALSE:
        low, high = (1 - verdict["blind"][rule] for rule in ("always_fake", "always_real"))
        lines.append(
            f"verdict error          {verdict['error']:7.2%}   real against fake alone; blind: always fake "
            f"{1 - low:.0%}, always real {1 - high:.0%}"
        )
    if verdict.get("auroc") is not None:
        lines.append(f"AUROC of P(fake)       {verdict['auroc']:7.4f}")
    if metrics["chance_error"] is not None:
        lines.append("blind, error without seeing the image:")
        lines.append(f"  {'chance':<21}{metrics['chance_error']:7.2%}")
        for rule, error in metrics["blind"].items():
            beaten = "   BEATS THE MODEL" if error < low_error else ""
            lines.append(f"  {rule:<21}{error:7.2%}{beaten}   ({1 - error:.0%} right)")
    if "text" in metrics:
        lines.append(f"ROUGE-L                {metrics['text']['rouge_l']:7.4f}")
        if metrics["text"]["similarity"] is not None:
            lines.append(f"similarity             {metrics['text']['similarity']:7.4f}")
    lines.append("error on:")
    for name, part in metrics["per_generator"].items():
        low, high = part["error_interval_95"]
        lines.append(f"  {name:<21}{part['error']:7.2%}   of {part['items']} ({low:.0%} to {high:.0%})")
    if "mcnemar" in metrics:
        m = metrics["mcnemar"]
        lines.append(
            f"against the other: {m['fixed']} fixed, {m['broken']} broken, exact McNemar p = {m['p']:.3f}"
        )
    return "\n".join(lines)
