"""Evaluate a checkpoint on shards: predictions.parquet and metrics.json."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataio.core import atomic
from dataio.core.errors import UserError, reason_of, writing
from dataio.shards.groups import groups_of, read_groups
from dataio.shards.manifest import read_manifest
from dataio.shards.shard_set import ShardSet
from engines.evaluate.intervals import DEFAULT_RESAMPLES
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.open_set import check_held_out
from engines.evaluate.predictions import build_table, write_predictions
from engines.runtime.command import is_main_process

PREDICTIONS, METRICS = "predictions.parquet", "metrics.json"
_HINT = "choose another folder"


def evaluate_checkpoint(
    *,
    checkpoint: str,
    data: str,
    split: str,
    output: str,
    batch: int | None = None,
    mirror: bool = False,
    verify: bool = False,
    threads: int | None = None,
    groups: str = "",
    resamples: int = DEFAULT_RESAMPLES,
    held_out: Sequence[str] = (),
    other_codec: bool = False,
) -> dict[str, Any] | None:
    """Predict a split, compute its metrics and write both; under torchrun every rank calls this.

    Args:
        checkpoint: RUN/best.pt or a file of RUN/checkpoints.
        data: shard folder. split: the split to predict.
        output: folder for predictions.parquet and metrics.json, created if missing; existing
            files of these names are replaced.
        batch: images per forward pass; None for the default of `predict_split`.
        mirror: see `predict_split`. verify: check the shards' SHA-256 first.
        threads: CPU threads of PyTorch; None for this process's share of the cores.
        groups: CSV of path and group of images that are not independent; intervals resample
            whole groups.
        resamples: of the bootstrap. held_out: see `engines.evaluate.open_set.compute_open_set`.
        other_codec: see `predict_split`; metrics.json records the differences.

    Returns:
        the metrics on rank 0, None on the others.

    Raises:
        UserError: the output cannot be written or a held-out name is unknown (both checked
            before anything is computed); what `predict_split` raises; a sample has no
            prediction.
    """
    if is_main_process():
        check_writable(output)
        if held_out:
            check_held_out(held_out, read_manifest(data)["generators"])
    from engines.evaluate.split_inference import predict_split

    arrays = predict_split(
        checkpoint,
        data,
        split,
        batch=batch,
        mirror=mirror,
        verify=verify,
        threads=threads,
        other_codec=other_codec,
    )
    if arrays is None:
        return None
    if groups:
        named = read_groups(groups)
        arrays.group = groups_of(ShardSet(data, split), arrays.sample_id.tolist(), named, groups)
    table = build_table(arrays)
    expected = read_manifest(data)["splits"][split]["samples"]
    if table.num_rows != expected:
        raise UserError(
            f"{data}: {table.num_rows} samples of the {split} split were predicted, expected {expected}; "
            "were the shards rewritten meanwhile? evaluate once more"
        )
    metrics = compute_metrics(table, resamples=resamples, held_out=held_out)
    folder = Path(output)
    with writing(output, field="output", hint=_HINT):
        folder.mkdir(parents=True, exist_ok=True)
        # Old metrics must not lie beside new predictions.
        (folder / METRICS).unlink(missing_ok=True)
    write_predictions(folder / PREDICTIONS, table)
    write_metrics(folder / METRICS, metrics)
    return metrics


def write_metrics(path: str | Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(Path(path).parent, field="output", hint=_HINT):
        atomic.write_text(Path(path), json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def check_writable(output: str) -> None:
    """Check that `output` can be created and written, leaving nothing behind.

    Raises:
        UserError: it cannot.
    """
    folder = Path(output)
    for name in (PREDICTIONS, METRICS):
        if (folder / name).is_dir():
            raise _unwritable(output, f"{folder / name} is a folder")
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise _unwritable(output, f"{nearest} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _unwritable(output, f"{nearest}: {reason_of(error)}") from None


def _unwritable(output: str, reason: str) -> UserError:
    return UserError(f"cannot be written ({reason}); {_HINT}", field="output", value=output)
