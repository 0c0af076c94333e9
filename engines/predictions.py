"""The predictions table: one row per image, from which every figure is computed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataio.atomic import write_with
from dataio.errors import UserError

_META = "telltale"
_COLUMNS = ("sample_id", "key", "generator", "generator_pred", "object", "object_pred", "p_fake")


@dataclass(frozen=True)
class PredictionArrays:
    """What inference yields, as arrays over N images.

    sample_id int64 [N]; key [N]; generator int64 [N]; object int64 [N], -1 where unknown;
    generator_probability float64 [N, G]; object_top5 int64 [N, <= 5], best first; the
    label spaces; checkpoint: plain values that say where the predictions come from.
    """

    sample_id: NDArray[np.int64]
    key: list[str]
    generator: NDArray[np.int64]
    object: NDArray[np.int64]
    generator_probability: NDArray[np.float64]
    object_top5: NDArray[np.int64]
    generators: Sequence[str]
    objects: Sequence[str]
    checkpoint: dict[str, Any]


@dataclass(frozen=True)
class Predictions:
    """The table with its label spaces.

    Attributes:
        table: columns sample_id (int64), key, generator and generator_pred (names), object
            (name or None), object_pred (name), p_fake (float64), p_<generator> (float32)
            for each of `generators`, object_top5 (list of names).
        generators, objects: label spaces. checkpoint: where the predictions come from.
    """

    table: pd.DataFrame
    generators: tuple[str, ...]
    objects: tuple[str, ...]
    checkpoint: dict[str, Any]

    def probabilities(self) -> NDArray[np.float64]:
        """P(generator), float64 [N, G]."""
        return self.table[[f"p_{name}" for name in self.generators]].to_numpy(np.float64)


def build_table(arrays: PredictionArrays) -> Predictions:
    """Arrays to the table, sorted by sample id.

    Raises:
        UserError: see `check`.
    """
    generators, objects = tuple(arrays.generators), tuple(arrays.objects)
    order = np.argsort(arrays.sample_id, kind="stable")
    probability = arrays.generator_probability[order]
    generator_names = np.array(generators, dtype=object)
    object_names = np.array([*objects, None], dtype=object)  # -1 is the last: None
    top5 = arrays.object_top5[order] if objects else np.full((len(order), 1), -1)
    table = pd.DataFrame(
        {
            "sample_id": arrays.sample_id[order],
            "key": [arrays.key[i] for i in order],
            "generator": generator_names[arrays.generator[order]],
            "generator_pred": generator_names[probability.argmax(1)],
            "object": object_names[arrays.object[order]],
            "object_pred": object_names[top5[:, 0]],
            "p_fake": 1 - probability[:, 0],
            **{f"p_{name}": probability[:, i].astype(np.float32) for i, name in enumerate(generators)},
            "object_top5": [list(object_names[row]) for row in top5],
        }
    )
    found = Predictions(table, generators, objects, dict(arrays.checkpoint))
    check(found, "predictions")
    return found


def check(predictions: Predictions, source: str) -> None:
    """Raise a UserError unless ids are unique, labels are known and probabilities are numbers."""
    table = predictions.table
    if len(table) == 0:
        raise UserError(f"{source}: has no rows")
    repeated = table["sample_id"][table["sample_id"].duplicated()]
    if len(repeated):
        raise UserError(f"{source}: sample_id {int(repeated.iloc[0])} stands twice; evaluate again")
    for column, known in (("generator", predictions.generators), ("object", predictions.objects)):
        strange = set(table[column].dropna()) - set(known)
        if strange:
            raise UserError(f"{source}: {column} {sorted(strange)[0]!r} is not in the label space of {len(known)} names")
    if table["generator"].isna().any() or table["generator_pred"].isna().any():
        raise UserError(f"{source}: a generator is missing; evaluate again")
    probability = predictions.probabilities()
    bad = ~np.isfinite(probability).all(1) | ~np.isfinite(table["p_fake"].to_numpy(np.float64))
    if bad.any():
        first = int(table["sample_id"].to_numpy()[bad][0])
        raise UserError(f"{source}: {int(bad.sum())} rows have NaN probabilities, sample_id {first} first")
    if (abs(probability.sum(1) - 1) > 1e-3).any():
        raise UserError(f"{source}: probabilities of the generators do not sum to 1; evaluate again")


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write the table as Parquet, atomically; label spaces go into the file's metadata."""
    table = pa.Table.from_pandas(predictions.table, preserve_index=False)
    about = {
        "generators": predictions.generators,
        "objects": predictions.objects,
        "checkpoint": predictions.checkpoint,
    }
    metadata = {**(table.schema.metadata or {}), _META.encode(): json.dumps(about).encode()}
    table = table.replace_schema_metadata(metadata)
    write_with(path, lambda temporary: pq.write_table(table, temporary))


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote.

    Raises:
        UserError: not such a file, columns missing, or see `check`.
    """
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_META.encode()])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of predictions") from None
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a predictions table of telltale ({' '.join(str(error).split())})") from None
    generators, objects = tuple(about["generators"]), tuple(about["objects"])
    missing = [c for c in (*_COLUMNS, *(f"p_{g}" for g in generators)) if c not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; evaluate again")
    frame = table.to_pandas()
    frame["object"] = frame["object"].astype(object).where(frame["object"].notna(), None)
    found = Predictions(frame, generators, objects, about["checkpoint"])
    check(found, str(path))
    return found
