"""The goals of one GPU and their floors, and which of them a GPU check has met."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.stats.text_table import text_table

CIFAKE_ERROR = 0.0306
"""Real/fake error on validation that the speed run must fall below."""


@dataclass(frozen=True)
class Goal:
    """A row of the table: a figure of a part of the check, its floor and its goal, in `unit`.

    Attributes:
        figure: (part, name). floor, goal: None where none is set here. lower: whether less is better.
        strict: the goal itself is not enough. also: a second figure and the most it may be for the goal.
        scale: the figure times this is in `unit`.
    """

    name: str
    figure: tuple[str, str]
    unit: str
    floor: float | None
    goal: float | None
    lower: bool = False
    strict: bool = False
    also: tuple[tuple[str, str], float] | None = None
    scale: float = 1.0

    def goal_text(self) -> str:
        """The goal in words, "" for none."""
        if self.goal is None:
            return ""
        sign = ("< " if self.lower else "> ") if self.strict else ""
        text = f"{sign}{in_words(self.goal, self.unit)}"
        return text if self.also is None else f"{text} with at most {self.also[1]:g} {self.also[0][1]}"


GOALS = (
    Goal("ResNet-50 step alone, 224 px, 256 images a pass", ("step", "as configured"), "img/s", 7_000, 9_000),
    Goal("the same from tars through DALI", ("tars", "from tars"), "img/s", 6_500, 7_950, strict=True),
    Goal(
        "the same with ghost batches of 32, global batch 1,024, one GPU",
        ("ghosts", "share of plain"),
        "% of the row above",
        95,
        99,
        scale=100,
    ),
    Goal(
        "share of time waiting for data",
        ("tars", "data wait share"),
        "%",
        5,
        1,
        lower=True,
        strict=True,
        scale=100,
    ),
    Goal(
        "decode + augment alone",
        ("decode", "hardware decoder"),
        "img/s",
        25_000,
        29_000,
        also=(("decode", "cores"), 3),
    ),
    Goal(
        f"CIFAKE-like set, decode included, to < {CIFAKE_ERROR:.2%} real/fake on validation",
        ("cifake", "seconds to the error"),
        "s",
        8,
        3,
        lower=True,
    ),
    Goal("finetuning beside upstream's recipe", ("finetune", "beside upstream"), "times", None, None),
    Goal("checkpoint stall", ("checkpoint", "stall"), "ms", 200, 20, lower=True),
    Goal(
        "training with jpeg, blur, resize and erase",
        ("augment", "share of plain"),
        "% of the plain rate",
        90,
        90,
        scale=100,
    ),
    Goal(
        "evaluation beside the slower of loader and model",
        ("evaluate", "evaluation beside the slower"),
        "%",
        90,
        90,
        scale=100,
    ),
    Goal(
        "prediction beside the slower of its codec and the model",
        ("evaluate", "prediction beside the slower"),
        "%",
        90,
        90,
        scale=100,
    ),
)


def judge(figures: Mapping[tuple[str, str], float], *, judged: bool) -> list[dict[str, Any]]:
    """A row for each goal: name, unit, floor, goal, measured, met.

    Args:
        figures: values by (part, name). judged: whether they are of a GPU and of a whole check.

    Returns:
        `met` is "goal", "floor", "no", "not measured", "measured" where there is no floor, or "not
        judged"; `goal` is text; `measured` and `floor` may be None.
    """
    return [_row(goal, figures, judged) for goal in GOALS]


def _row(goal: Goal, figures: Mapping[tuple[str, str], float], judged: bool) -> dict[str, Any]:
    found = figures.get(goal.figure)
    measured = None if found is None else found * goal.scale
    row = {"name": goal.name, "unit": goal.unit, "floor": goal.floor, "goal": goal.goal_text()}
    return {**row, "measured": measured, "met": _met(goal, measured, figures, judged)}


def _met(goal: Goal, measured: float | None, figures: Mapping[tuple[str, str], float], judged: bool) -> str:
    if measured is None:
        return "not measured"
    if not judged:
        return "not judged"
    if goal.floor is None or goal.goal is None:
        return "measured"
    sign = -1 if goal.lower else 1
    reached = (operator.gt if goal.strict else operator.ge)(sign * measured, sign * goal.goal)
    if reached and goal.also is not None:
        figure, most = goal.also
        reached = figures.get(figure, most + 1) <= most
    if reached:
        return "goal"
    return "floor" if sign * measured >= sign * goal.floor else "no"


def in_words(value: float, unit: str) -> str:
    """A number with its unit, thousands separated."""
    number = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".strip()


def goals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `judge` as Markdown."""
    cells = [
        [
            row["name"],
            "" if row["measured"] is None else in_words(row["measured"], row["unit"]),
            "" if row["floor"] is None else in_words(row["floor"], row["unit"]),
            row["goal"],
            row["met"],
        ]
        for row in rows
    ]
    return text_table(cells, ["what, one GPU", "measured", "floor", "goal", "met"], markdown=True)
