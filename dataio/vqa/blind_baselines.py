"""Image-blind baselines: how well a benchmark can be answered without its images.

Each baseline answers from the question's text alone. Its score is an expected accuracy (ties
are split evenly), so nothing here is random. Choosing the longest option answers 81 % of the
reference's multiple-choice benchmark. The baselines are therefore reported beside every score,
and `dataio.vqa.questions` refuses to write a benchmark on which one of them beats chance.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TRUE_FALSE, MULTIPLE_CHOICE, OPEN = "true_false", "multiple_choice", "open"
LETTERS = ("A", "B", "C", "D")
SIGNIFICANCE = 0.05
_FAKE = r"artificially\s+\w+|fake|artificial(?:ly)?|synthetic|generated|ai-generated|computer-generated|manipulated"
_REAL = r"real(?!-)|genuine|authentic|natural"
_WORD = re.compile(rf"\b(?:(not|isn't|never)\b(?:\s+\w+){{0,2}}?\s+)?({_FAKE}|{_REAL})\b", re.IGNORECASE)
_OPTION = re.compile(r"^[ \t]*([A-D])[:.)][ \t]*(.+?)[ \t]*$", re.MULTILINE)

VqaItem = Mapping[str, Any]


def kind_of(item: VqaItem) -> str:
    """The kind of question, decided by its answer: the reference's items have no field for it."""
    truth = str(item["ground_truth"])
    if truth in ("Real", "Fake"):
        return TRUE_FALSE
    return MULTIPLE_CHOICE if truth in LETTERS and len(options_of(item)) >= 2 else OPEN


def options_of(item: VqaItem) -> dict[str, str]:
    """The options in a question's text, by letter; empty if it has none."""
    return dict(_OPTION.findall(str(item["question"])))


def label_in_text(text: str, *, first: bool = False) -> str:
    """The label that a text states: "Fake", "Real", or "" if it is missing or ambiguous.

    Only the first sentence that names a label counts. Synonyms ("synthetic", "genuine") and
    negations ("not real") are understood.

    Args:
        first: take the first label of that sentence even if the other one follows, as in an
            option with a reason ("The image is artificial: real cameras are not black").
    """
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
        labels = []
        for negation, word in _WORD.findall(sentence):
            fake = re.fullmatch(_FAKE, word, re.IGNORECASE) is not None
            labels.append("Fake" if fake != bool(negation) else "Real")
        if labels:
            return labels[0] if first or len(set(labels)) == 1 else ""
    return ""


def expected_correct(item: VqaItem, choices: Sequence[str]) -> float:
    """Probability of the right answer when one of `choices` is drawn uniformly."""
    return choices.count(str(item["ground_truth"])) / len(choices) if choices else 0.0


def blind_scores(items: Sequence[VqaItem]) -> dict[str, float]:
    """Accuracy of each image-blind baseline over items of one kind, by name.

    true_false: always_fake, always_real, and by_wording (the most common answer among the
    other items with the same wording). multiple_choice: longest_option, shortest_option,
    most_common_letter, and always_fake and always_real, which choose any option with that
    label. open: none.
    """
    if not items:
        return {}
    kind = kind_of(items[0])
    if kind == TRUE_FALSE:
        rules: dict[str, Callable[[VqaItem], Sequence[str]]] = {
            "always_fake": lambda item: ["Fake"],
            "always_real": lambda item: ["Real"],
            "by_wording": _by_wording(items),
        }
    elif kind == MULTIPLE_CHOICE:
        counts = Counter(str(item["ground_truth"]) for item in items)
        top = [letter for letter, count in counts.items() if count == max(counts.values())]
        rules = {
            "longest_option": lambda item: _by_length(item, max),
            "shortest_option": lambda item: _by_length(item, min),
            # Equally common letters have the same accuracy, so any of them will do.
            "most_common_letter": lambda item: [top[0]],
            "always_fake": lambda item: _with_label(item, "Fake"),
            "always_real": lambda item: _with_label(item, "Real"),
        }
    else:
        return {}
    return {
        name: sum(expected_correct(item, rule(item)) for item in items) / len(items)
        for name, rule in rules.items()
    }


def chance_of(items: Sequence[VqaItem]) -> float:
    """Expected accuracy of a uniform guess among the options, over items of one kind."""
    if kind_of(items[0]) == TRUE_FALSE:
        return 0.5
    return sum(1 / len(options_of(item)) for item in items) / len(items)


def baselines_above_chance(items: Sequence[VqaItem]) -> list[tuple[str, float, float]]:
    """(baseline, its accuracy, chance) of each baseline significantly better than chance.

    One-sided exact binomial test at level `SIGNIFICANCE`. Empty for a sound benchmark.
    """
    if not items or kind_of(items[0]) == OPEN:
        return []
    chance, count = chance_of(items), len(items)
    better = []
    for rule, accuracy in blind_scores(items).items():
        right = int(accuracy * count + 1e-9)
        from scipy.stats import binomtest  # --help need not wait for it

        if binomtest(right, count, chance, alternative="greater").pvalue < SIGNIFICANCE:
            better.append((rule, accuracy, chance))
    return better


def _by_length(item: VqaItem, extreme: Callable[..., int]) -> list[str]:
    options = options_of(item)
    length = extreme(len(text) for text in options.values())
    return [letter for letter, text in options.items() if len(text) == length]


def _with_label(item: VqaItem, label: str) -> list[str]:
    return [letter for letter, text in options_of(item).items() if label_in_text(text, first=True) == label]


def _by_wording(items: Sequence[VqaItem]) -> Callable[[VqaItem], Sequence[str]]:
    counts = Counter((str(item["question"]), str(item["ground_truth"])) for item in items)

    def rule(item: VqaItem) -> Sequence[str]:
        question, truth = str(item["question"]), str(item["ground_truth"])
        # Leave one out: the item's own answer must not count. Where both answers are equally
        # common, leaving it out puts the wrong one ahead by 1, so a lead of 1 counts as a tie.
        scores = {a: counts[question, a] - (a == truth) for a in ("Fake", "Real")}
        return [answer for answer, count in scores.items() if count >= max(scores.values()) - 1]

    return rule
