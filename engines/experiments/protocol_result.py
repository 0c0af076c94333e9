"""Merge a protocol's cells into protocol.json and its tables.

protocol.json:

    schema, version    "telltale-protocol", 1
    protocol, seed, settings, checkpoint (null where the protocol trains its own)
    cells              a list: name, the cell's condition (view; operation and severity;
                       train and held_out), metrics, per_generator, counts
                       (images, real, fake, and of views left_out and unreadable)
    failed             a list: name, message
    raw                robustness, aligned: metrics of the originals as they are
    curves             robustness: by operation, by severity: severity, SUMMARY_METRICS, drop
    genimage           robustness: by GenImage's names: SUMMARY_METRICS, drop; and their mean
    gaps               aligned: by view: raw minus view in each of SUMMARY_METRICS
    matrix             cross_generator, leave_one_out: train (names of rows), test (columns)
                       and for each of SUMMARY_METRICS a list of rows: that generator against nature
    summary            cross_generator: means of each of SUMMARY_METRICS over the diagonal (seen), off it
                       (unseen) and all; leave_one_out: by held-out generator, mean and worst

Everything is a fraction; a value that cannot be computed is null.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engines.experiments.protocol_cells import Protocol
from engines.stats.text_table import text_table

SCHEMA, VERSION = "telltale-protocol", 1
RESULT, RESULT_TABLE = "protocol.json", "protocol.md"
SUMMARY_METRICS = ("auroc", "balanced_accuracy", "accuracy")
_Row = dict[str, Any]


def merge_cells(protocol: Protocol, cells: list[_Row], failures: dict[str, str]) -> _Row:
    """The content of protocol.json.

    Args:
        cells: results in the order of the cells. failures: {name: message} of the others.
    """
    kind = protocol.config.protocol
    merged: _Row = {
        "schema": SCHEMA,
        "version": VERSION,
        "protocol": kind,
        "seed": protocol.config.seed,
        "settings": protocol.settings,
        "checkpoint": protocol.checkpoint,
        "cells": cells,
        "failed": [{"name": name, "message": message} for name, message in failures.items()],
    }
    if kind in ("robustness", "aligned"):
        raw = next((cell["metrics"] for cell in cells if cell["name"] == "raw"), None)
        merged["raw"] = raw
        views = [cell for cell in cells if cell["name"] != "raw"]
        if kind == "aligned":
            merged["gaps"] = {cell["name"]: _drop(raw, cell["metrics"]) for cell in views}
        else:
            merged |= _robustness(raw, views)
    else:
        matrix = _matrix(cells)
        diagonal = [cell.get("held_out", cell["train"][0]) for cell in cells]
        merged["matrix"] = matrix
        merged["summary"] = (_seen_and_unseen if kind == "cross_generator" else _held_out)(matrix, diagonal)
    return merged


def _drop(raw: _Row | None, metrics: _Row) -> _Row:
    """The raw value minus the view's."""
    return {
        key: None if raw is None or raw[key] is None or metrics[key] is None else raw[key] - metrics[key]
        for key in SUMMARY_METRICS
    }


def _robustness(raw: _Row | None, cells: list[_Row]) -> _Row:
    def point(cell: _Row) -> _Row:
        return {**{key: cell["metrics"][key] for key in SUMMARY_METRICS}, "drop": _drop(raw, cell["metrics"])}

    curves: dict[str, list[_Row]] = {}
    for cell in (c for c in cells if not c.get("genimage")):
        curves.setdefault(cell["operation"], []).append({"severity": cell["severity"], **point(cell)})
    named = {cell["name"]: point(cell) for cell in cells if cell.get("genimage")}
    if named:
        named["mean"] = {key: _mean(entry[key] for entry in named.values()) for key in SUMMARY_METRICS}
    return {"curves": curves, "genimage": named}


def _matrix(cells: list[_Row]) -> _Row:
    test = list(dict.fromkeys(name for cell in cells for name in cell["per_generator"]))
    values = {
        key: [[cell["per_generator"].get(name, {}).get(key) for name in test] for cell in cells]
        for key in SUMMARY_METRICS
    }
    return {"train": [cell["name"] for cell in cells], "test": test, **values}


def _seen_and_unseen(matrix: _Row, diagonal: list[str]) -> _Row:
    summary: _Row = {}
    for key in SUMMARY_METRICS:
        pairs = [
            (trained_on == name, value)
            for trained_on, row in zip(diagonal, matrix[key], strict=True)
            for name, value in zip(matrix["test"], row, strict=True)
        ]
        summary[key] = {
            "seen": _mean(value for seen, value in pairs if seen),
            "unseen": _mean(value for seen, value in pairs if not seen),
            "all": _mean(value for _, value in pairs),
        }
    return summary


def _held_out(matrix: _Row, diagonal: list[str]) -> _Row:
    summary: _Row = {}
    for key in SUMMARY_METRICS:
        values = {
            name: row[matrix["test"].index(name)] if name in matrix["test"] else None
            for name, row in zip(diagonal, matrix[key], strict=True)
        }
        known = [value for value in values.values() if value is not None]
        summary[key] = {"held_out": values, "mean": _mean(values.values()), "worst": min(known, default=None)}
    return summary


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None for no values, or where one is None, since it would be the mean of other cells."""
    numbers = list(values)
    known = [value for value in numbers if value is not None]
    return float(np.mean(known)) if known and len(known) == len(numbers) else None


def format_result(merged: _Row) -> str:
    """protocol.json as Markdown: percentages, and AUROC with four digits."""
    images = [cell["counts"]["images"] for cell in merged["cells"]]
    lines = [f"# {merged['protocol']}", ""]
    if merged["checkpoint"]:
        lines += [
            f"{merged['checkpoint']['file']} at step {merged['checkpoint']['step']}, "
            f"{max(images, default=0)} images, seed {merged['seed']}",
            "",
        ]
    if merged["protocol"] == "aligned":
        lines += _aligned_table(merged)
    elif merged["protocol"] == "robustness":
        lines += _robustness_table(merged)
    else:
        lines += _matrix_tables(merged)
    unreadable = max((cell["counts"].get("unreadable", 0) for cell in merged["cells"]), default=0)
    if unreadable:
        lines.append(f"{unreadable} of the originals could not be read and are not among these images")
    for failure in merged["failed"]:
        lines.append(f"failed: {failure['name']}: {failure['message']}")
    return "\n".join(lines).rstrip()


def _aligned_table(merged: _Row) -> list[str]:
    rows = []
    for cell in merged["cells"]:
        gap, counts = merged["gaps"].get(cell["name"]), cell["counts"]
        rows.append(
            [
                cell["name"],
                *_headline(cell["metrics"]),
                *([_score(gap["auroc"]), _points(gap["balanced_accuracy"])] if gap else ["", ""]),
                str(counts["real"]),
                str(counts["fake"]),
                str(counts["left_out"]),
            ]
        )
    heads = ["view", "AUROC", "balanced", "accuracy", "AUROC gap", "balanced gap", "real", "fake", "left out"]
    return [_table(heads, rows), "", "The gap is the raw value minus the view's.", ""]


def _robustness_table(merged: _Row) -> list[str]:
    rows, raw = [], merged["raw"]
    if raw is not None:
        rows.append(["raw", "", *_headline(raw), "", ""])
    points = [(name, f"{p['severity']:g}", p) for name, curve in merged["curves"].items() for p in curve]
    points += [(name, "", p) for name, p in merged["genimage"].items()]
    for name, severity, point in points:
        drop = point.get("drop")
        drops = [_score(drop["auroc"]), _points(drop["balanced_accuracy"])] if drop else ["", ""]
        title = "mean of GenImage's six" if name == "mean" else name
        rows.append([title, severity, *_headline(point), *drops])
    heads = ["operation", "severity", "AUROC", "balanced", "accuracy", "AUROC drop", "balanced drop"]
    return [_table(heads, rows), ""]


def _matrix_tables(merged: _Row) -> list[str]:
    matrix, summary = merged["matrix"], merged["summary"]
    lines: list[str] = []
    for key, title, shown in (
        ("balanced_accuracy", "Balanced accuracy at P(fake) >= 0.5, %", _hundred),
        ("auroc", "AUROC", _score),
    ):
        rows = [
            [name, *map(shown, row), shown(_mean(row))]
            for name, row in zip(matrix["train"], matrix[key], strict=True)
        ]
        lines += [f"{title}: rows are trainings, columns are generators against nature", ""]
        lines += [_table(["train \\ test", *matrix["test"], "mean"], rows), ""]
        if merged["protocol"] == "cross_generator":
            parts = [f"{word} {shown(summary[key][word])}" for word in ("seen", "unseen", "all")]
        else:
            held = summary[key]["held_out"]
            parts = [f"{name} {shown(value)}" for name, value in held.items()]
            parts = [
                "held out: " + ", ".join(parts),
                *(f"{w} {shown(summary[key][w])}" for w in ("mean", "worst")),
            ]
        lines += ["; ".join(parts), ""]
    return lines


def _headline(metrics: _Row) -> list[str]:
    return [_score(metrics["auroc"]), _percent(metrics["balanced_accuracy"]), _percent(metrics["accuracy"])]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return text_table(rows, heads, markdown=True, align="l" + "r" * (len(heads) - 1))


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _hundred(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"
