"""Evaluating a checkpoint: predictions, metrics, and where they are written."""

import json
import os
from pathlib import Path
from typing import Any

from dataio.atomic import write_text
from dataio.errors import UserError
from engines.inference import predict_split
from engines.metrics import compute_metrics
from engines.predictions import build_table, write_predictions
from engines.command import is_main_process


def evaluate_checkpoint(
    *, checkpoint: str, data: str, split: str, output: str | Path, batch: int | None = None, verify: bool = False
) -> dict[str, Any] | None:
    """Predict a split, write predictions.parquet and metrics.json, return the metrics.

    Args:
        checkpoint: best.pt or a file of RUN/checkpoints. data: shard folder.
        split: train, val or test. output: folder of the results, made where missing.
        batch: images per forward pass. verify: check the shards' SHA-256 first.

    Returns:
        the metrics on rank 0, None on the others.

    Raises:
        UserError: an output that cannot be written (before any work), or see
            `engines.inference.predict_split`.
    """
    output = Path(output)
    if is_main_process():
        _check_writable(output)
    arrays = predict_split(checkpoint, data, split, batch=batch, verify=verify)
    if arrays is None:
        return None
    predictions = build_table(arrays)
    metrics = compute_metrics(predictions)
    metrics["data"] = {"folder": Path(data).name, "split": split}
    output.mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.parquet", predictions)
    write_text(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


def _check_writable(output: Path) -> None:
    """Fail before minutes of work; leaves nothing behind."""


    place = output
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--output {output}: cannot be written (at {place}); choose another folder")


