"""metrics.json as plain text for a terminal of 100 columns."""

from collections.abc import Mapping
from typing import Any

from engines.evaluate.open_set import open_set_lines
from engines.evaluate.sections.base import NO_CALIBRATION, headline_intervals, percent_text, score_text
from engines.evaluate.sections.registry import all_sections, shown_in
from engines.stats.text_table import text_table

_LONGEST = 24  # of a generator's name


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The metrics as plain text: errors in per cent with counts and 95 % intervals.

    Args:
        metrics: the result of `compute_metrics`.
    """
    counts = metrics["counts"]
    known = f"{counts['object_known']} of known object"
    lines = [f"{counts['images']} images: {counts['real']} real, {counts['fake']} fake; {known}"]
    if reason := metrics["reasons"].get("overall.real_fake_error"):
        lines.append(f"{reason}: no figure of real against fake, which a constant answer would get right")
    if (metrics.get("data") or {}).get("codec_differences"):
        lines.append(
            f"of another codec than the training's: {'; '.join(metrics['data']['codec_differences'])}"
        )
    lines += ["", _errors(metrics), ""]
    for section in all_sections():
        if section.lines is not None:
            lines += section.lines(metrics)
    lines += ["", _per_generator(metrics)]
    if metrics["open_set"] is not None:
        lines += ["", *open_set_lines(metrics["open_set"])]
    return "\n".join(lines)


def _errors(metrics: Mapping[str, Any]) -> str:
    intervals = headline_intervals(metrics)["overall"]
    rows: list[tuple[str, str, str | None, str | None]] = []
    for metric, title in shown_in(lambda metric: metric.row):
        value, interval = metrics["overall"][metric.key], intervals.get(metric.key)
        if value is None:
            if metric.two_classes and metrics["reasons"].get(f"overall.{metric.key}") != NO_CALIBRATION:
                rows.append((title, "-", None, None))
            continue
        total = metric.total(metrics["counts"])
        low_high = None if interval is None else " to ".join(map(percent_text, interval))
        rows.append((title, percent_text(value), f"{round(value * total)} of {total}", low_high))
    over = f"95 % interval, over {metrics['intervals']['headline']}"
    return text_table(rows, ("", "error", "wrong of all", over), align="lrll")


def _per_generator(metrics: Mapping[str, Any]) -> str:
    intervals, rows = headline_intervals(metrics)["per_generator"], []
    columns = shown_in(lambda metric: metric.generator_column)
    for name, values in metrics["per_generator"].items():
        if values["n"] == 0:
            continue
        figures = [
            score_text(values[metric.key]) if metric.score else percent_text(values[metric.key])
            for metric, _ in columns
        ]
        interval = intervals[name]["auroc"]
        low_high = None if interval is None else " to ".join(map(score_text, interval))
        short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        rows.append((short, values["n"], *figures, low_high))
    headers = ("errors on", "images", *(title for _, title in columns), "95 % interval")
    return text_table(rows, headers, align="l" + "r" * (len(columns) + 1) + "l")
