"""What a benchmark's questions give away without their images.

A rule answers from the text alone. Its score is an expectation (ties are broken evenly), so
that nothing here is random. The reference's multiple-choice benchmark is solved to 81 % by
its longest option; these rules are printed beside every score, and a benchmark of ours that
one of them beats chance on is not written.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

TRUE_FALSE, MULTIPLE_CHOICE, OPEN = "true_false", "multiple_choice", "open"
LETTERS = ("A", "B", "C", "D")
SIGNIFICANCE = 0.05
_FAKE = r"artificially\s+\w+|fake|artificial(?:ly)?|synthetic|generated|ai-generated|computer-generated|manipulated"
_REAL = r"real(?!-)|genuine|authentic|natural"
_WORD = re.compile(rf"\b(?:(not|isn't|never)\b(?:\s+\w+){{0,2}}?\s+)?({_FAKE}|{_REAL})\b", re.IGNORECASE)
_OPTION = re.compile(r"^[ \t]*([A-D])[:.)][ \t]*(.+?)[ \t]*$", re.MULTILINE)

VqaItem = Mapping[str, Any]


def kind_of(item: VqaItem) -> str:
    """The kind of question: by its answer, since the reference's items do not say."""
    truth = str(item["ground_truth"])
    if truth in ("Real", "Fake"):
        return TRUE_FALSE
    return MULTIPLE_CHOICE if truth in LETTERS and len(options_of(item)) >= 2 else OPEN


def options_of(item: VqaItem) -> dict[str, str]:
    """The options in a question's text, by letter; empty where there are none."""
    return dict(_OPTION.findall(str(item["question"])))


def label_in_text(text: str, *, first: bool = False) -> str:
    """Give "Fake" or "Real" where the first sentence with a verdict names exactly one, else "".

    Args:
        first: take the first one named even where the other follows, as in an option's
            reasons ("The image is artificial: real cameras are not black").
    """
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
        found = []
        for negation, word in _WORD.findall(sentence):
            fake = re.fullmatch(_FAKE, word, re.IGNORECASE) is not None
            found.append("Fake" if fake != bool(negation) else "Real")
        if found:
            return found[0] if first or len(set(found)) == 1 else ""
    return ""


def expected_correct(item: VqaItem, choices: Sequence[str]) -> float:
    """Chance of the right answer when one of `choices` is taken at random."""
    return choices.count(str(item["ground_truth"])) / len(choices) if choices else 0.0


def blind_scores(items: Sequence[VqaItem]) -> dict[str, float]:
    """Accuracy of each blind rule over items of one kind, by name.

    true_false: always_fake, always_real, and by_wording (the answer most common among the
    other items of the same wording). multiple_choice: longest_option, shortest_option,
    most_common_letter, and always_fake and always_real, which take any option of that
    verdict. open: none.
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
            # Any of the most common letters is as common: no tie to break.
            "most_common_letter": lambda item: [top[0]],
            "always_fake": lambda item: _of_verdict(item, "Fake"),
            "always_real": lambda item: _of_verdict(item, "Real"),
        }
    else:
        return {}
    return {
        name: sum(expected_correct(item, rule(item)) for item in items) / len(items)
        for name, rule in rules.items()
    }


def chance_of(items: Sequence[VqaItem]) -> float:
    """Accuracy of a guess among the options, over items of one kind."""
    if kind_of(items[0]) == TRUE_FALSE:
        return 0.5
    return sum(1 / len(options_of(item)) for item in items) / len(items)


def baselines_above_chance(items: Sequence[VqaItem]) -> list[tuple[str, float, float]]:
    """(rule, its accuracy, chance) of the rules that beat chance significantly.

    One-sided exact binomial test at `SIGNIFICANCE`; empty for a benchmark that cannot be gamed so.
    """
    if not items or kind_of(items[0]) == OPEN:
        return []
    chance, count = chance_of(items), len(items)
    found = []
    for rule, accuracy in blind_scores(items).items():
        right = int(accuracy * count + 1e-9)
        if binomtest(right, count, chance, alternative="greater").pvalue < SIGNIFICANCE:
            found.append((rule, accuracy, chance))
    return found


def _by_length(item: VqaItem, extreme: Callable[..., int]) -> list[str]:
    options = options_of(item)
    length = extreme(len(text) for text in options.values())
    return [letter for letter, text in options.items() if len(text) == length]


def _of_verdict(item: VqaItem, verdict: str) -> list[str]:
    return [letter for letter, text in options_of(item).items() if label_in_text(text, first=True) == verdict]


def _by_wording(items: Sequence[VqaItem]) -> Callable[[VqaItem], Sequence[str]]:
    counts = Counter((str(item["question"]), str(item["ground_truth"])) for item in items)

    def rule(item: VqaItem) -> Sequence[str]:
        question, truth = str(item["question"]), str(item["ground_truth"])
        # Without the item itself, whose answer the rule must not have seen; that makes the
        # other answer one more common where both are as common, which is no reason to give it.
        scores = {a: counts[question, a] - (a == truth) for a in ("Fake", "Real")}
        return [answer for answer, count in scores.items() if count >= max(scores.values()) - 1]

    return rule
