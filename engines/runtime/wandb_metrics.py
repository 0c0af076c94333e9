"""The names that Weights & Biases and TensorBoard get for the values of metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

METRIC_NAMES = ("train/*", "val/*", "perf/*", "images/*")
"""All names of a run, for Weights & Biases' define_metric."""


def row_of(record: Mapping[str, Any], perf: Mapping[str, float] | None) -> dict[str, Any]:
    """A line of metrics.jsonl as train/..., val/... and perf/...; "step" and "kind" are not values."""
    kind = record["kind"]
    values = {f"{kind}/{key}": value for key, value in record.items() if key not in ("kind", "step", "perf")}
    # A validation's seconds must not hide a step's.
    prefix = "perf/" if kind == "train" else f"perf/{kind}_"
    return values | {f"{prefix}{key}": value for key, value in (perf or {}).items()}


class BestValues:
    """The lowest loss and errors of all validations, as best/NAME.

    W&B's own minimum (define_metric's `summary`) counts from a process's start, and makes of val/NAME a
    group of values, which a sweep's `metric` cannot name.

    Args:
        lines: of metrics.jsonl, before this process.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.values: dict[str, float] = {}
        for line in lines:
            self.update(line)

    def update(self, record: Mapping[str, Any]) -> bool:
        """Count a line; returns whether a value is better than all before."""
        better = False
        if record["kind"] == "val":
            for key, value in record.items():
                if not key.endswith(("loss", "_error")) or value is None or not math.isfinite(value):
                    continue
                if value < self.values.get(f"best/{key}", math.inf):
                    self.values[f"best/{key}"], better = value, True
        return better
