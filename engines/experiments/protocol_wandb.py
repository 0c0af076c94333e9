"""A protocol's result for Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.experiments.protocol_result import SUMMARY_METRICS
from engines.runtime.wandb_results import Results, ResultTable, send_results, table_of


def send_protocol(folder: Path, mode: str, merged: Mapping[str, Any], checkpoint: str) -> None:
    """Send a protocol's result to Weights & Biases; a failure is a warning.

    Args:
        folder: of the result. mode: see `engines.runtime.wandb_results`. merged: of protocol.json.
        checkpoint: that was measured, "" where the protocol trained its own.
    """
    rows = {cell["name"]: {**cell["metrics"], **cell["counts"]} for cell in merged["cells"]}
    tables = {"cells": table_of(rows, "cell")}
    matrix = merged.get("matrix") or {}
    for key in SUMMARY_METRICS if matrix else ():
        lines = [[name, *values] for name, values in zip(matrix["train"], matrix[key], strict=True)]
        tables[f"matrix_{key}"] = ResultTable(["trained on", *matrix["test"]], lines)
    values = {key: merged[key] for key in ("raw", "gaps", "genimage", "summary") if merged.get(key)}
    for operation, points in merged.get("curves", {}).items():
        values[operation] = {str(point["severity"]): point for point in points}
    about = {"protocol": merged["protocol"], "seed": merged["seed"], "settings": merged["settings"]}
    settings = {**about, "checkpoint": merged["checkpoint"]}
    send_results(folder, mode, Results("protocol", settings, values, tables=tables), measured=checkpoint)
