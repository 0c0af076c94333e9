"""Shards, and what a checkpoint reaches on them."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def open_shards(folder: str | PathLike[str], split: str, *, verify: bool = False) -> ShardSet:
    """Open one split of a folder of shards for reading.

    Args:
        folder: written by `telltale shard`. split: "train", "val" or "test".
        verify: check the SHA-256 of every shard first.

    Raises:
        UserError: missing, damaged or foreign files, or an unknown split.

    Examples:
        >>> import telltale
        >>> shards = telltale.open_shards("data/quickstart", "test")
        >>> shards.labels.generators[0]
        'nature'
        >>> shards.read(0).dtype  # the bytes of the first image's file
        dtype('uint8')
    """
    return ShardSet(fspath(folder), split, verify=verify)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a checkpoint reaches on a split.

    Attributes:
        metrics: the contents of metrics.json.
        table: the contents of predictions.parquet, a row for each image.
    """

    metrics: dict[str, Any]
    table: "pa.Table"

    def to_dataframe(self) -> "pd.DataFrame":
        """The predictions, a row for each image."""
        return self.table.to_pandas()


def evaluate(
    path_or_run: str | PathLike[str],
    data: str | PathLike[str],
    *,
    split: str = "test",
    output: str | PathLike[str] | None = None,
    batch: int | None = None,
    resamples: int = 1000,
    held_out: Sequence[str] = (),
    other_codec: bool = False,
) -> Evaluation:
    """Predict a split and compute the metrics, as `telltale evaluate` does.

    Args:
        path_or_run: as for `load`. data: folder of shards.
        split: "test"; "val" for what is still to be chosen.
        output: folder for predictions.parquet and metrics.json; None keeps no file.
        batch: images of one forward pass; None takes 4 times the training's micro-batch,
            on a GPU at least 256 images of 224 px (as many pixels of other sizes).
        resamples: of the bootstrap behind the intervals.
        held_out: generators that the model was not trained on.
        other_codec: accept shards of another codec policy than the checkpoint's; `metrics["data"]`
            names the differences.

    Raises:
        UserError: a bad checkpoint or bad shards, label spaces or codec policies that differ, an
            output that cannot be written, or a number below 1.

    Examples:
        >>> import telltale
        >>> result = telltale.evaluate("runs/quickstart", "data/quickstart", split="test")
        >>> 0 <= result.metrics["overall"]["generator_error"] <= 1
        True
        >>> result.to_dataframe().groupby("generator")["p_fake"].mean().between(0, 1).all()
        np.True_
    """
    for name, value in (("batch", batch), ("resamples", resamples)):
        if value is not None and value < 1:
            raise UserError("expected 1 or more", field=name, value=value)
    from engines.evaluate.evaluate import PREDICTIONS, evaluate_checkpoint
    from engines.evaluate.predictions import read_predictions

    with tempfile.TemporaryDirectory(prefix="telltale-") as scratch:
        folder = scratch if output is None else fspath(output)
        metrics = evaluate_checkpoint(
            checkpoint=fspath(path_or_run),
            data=fspath(data),
            split=split,
            output=folder,
            batch=batch,
            resamples=resamples,
            held_out=held_out,
            other_codec=other_codec,
        )
        if metrics is None:
            raise RuntimeError("evaluate runs in one process; use `telltale evaluate` for several")
        return Evaluation(metrics, read_predictions(Path(folder) / PREDICTIONS))
