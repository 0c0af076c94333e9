"""The predictions table: one row per image, from which every metric is computed.

Columns: sample_id int64; key string; generator (true) and generator_pred string; object
(true, null where unknown) and object_pred string; p_fake float64; one float32 column of
probabilities for each generator, named by `probability_column`; object_top5, a list of
names, best first; only where images belong together, group string (null or "" where
alone); and identity string, which older tables lack. Label spaces and the checkpoint's
description are JSON in the schema's metadata (`telltale.generators`, `telltale.objects`,
`telltale.checkpoint`); `telltale.unseen`, only where there are any, names true generators that
the model has no output for, and `telltale.data` describes the shards.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataio.core import atomic
from dataio.core.errors import UserError, one_line, writing

TOP = 5
_SUM_TOLERANCE = 1e-3  # of a row's probabilities, which bf16 or float32 may have rounded


@dataclass(kw_only=True)
class PredictionArrays:
    """A model's predictions for every image of a split, as arrays; rows may be in any order.

    Attributes:
        sample_id: int64 [N], each of 0..N-1 once.
        key: N names of the samples in their shards.
        generator: int64 [N], true labels.
        object: int64 [N], true labels, -1 where unknown.
        generator_probability: float64 [N, G], rows sum to 1.
        object_top5: int64 [N, min(5, O)], the likeliest objects, best first.
        generators: the G names of the generator head's outputs; index 0 is "nature".
        objects: the O names of the object head's outputs.
        checkpoint: plain values that describe the checkpoint.
        group: N names shared by images that are not independent; None or "" for no group.
        unseen: names of true generators outside of the label space; label G + i means the
            i-th of them.
        identity: N hexadecimal digests of the images, by which evaluations are compared.
        data: plain values that describe the shards, see `engines.checkpoint.contract.check_shards`;
            "identity" is what the digests are of, "source" (files) or "stored" (shards' images).
    """

    sample_id: NDArray[np.int64]
    key: Sequence[str]
    generator: NDArray[np.int64]
    object: NDArray[np.int64]
    generator_probability: NDArray[np.float64]
    object_top5: NDArray[np.int64]
    generators: Sequence[str]
    objects: Sequence[str]
    checkpoint: dict[str, Any] = field(default_factory=dict)
    group: Sequence[str | None] | None = None
    unseen: Sequence[str] = ()
    identity: Sequence[str] | None = None
    data: dict[str, Any] = field(default_factory=dict)


def probability_column(generator: str) -> str:
    """The column of one generator's probability: "p_<generator>".

    A generator called "fake" has "p_generator_fake", because p_fake is P(not nature).
    """
    return "p_generator_fake" if generator == "fake" else f"p_{generator}"


def label_spaces(table: pa.Table) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the generator head's and of the object head's outputs."""
    return tuple(_metadata(table, "generators")), tuple(_metadata(table, "objects"))


def checkpoint_info(table: pa.Table) -> dict[str, Any]:
    """The checkpoint that predicted this table, as plain values.

    It has "calibration" where the checkpoint has one: its temperature, shift, threshold,
    unsure ([low, high]) and false_alarm_rate, see `engines.evaluate.calibration`. p_fake stays raw.
    """
    return dict(_metadata(table, "checkpoint"))


def data_info(table: pa.Table) -> dict[str, Any]:
    """The description of the shards that were predicted; {} in older tables.

    Raises:
        UserError: the table's description is not one.
    """
    info = _metadata(table, "data", {})
    if not isinstance(info, dict):
        raise UserError(f"predictions: telltale.data is a {type(info).__name__}, expected an object")
    return info


def identities(table: pa.Table) -> pa.ChunkedArray | None:
    """What each image is known by wherever it is, strings [N]; None in older tables."""
    return table["identity"] if "identity" in table.column_names else None


def unseen_generators(table: pa.Table) -> tuple[str, ...]:
    """True generators in the table that the model has no output for."""
    return tuple(_metadata(table, "unseen", []))


def clusters(table: pa.Table) -> NDArray[np.int64] | None:
    """Which images belong together: int64 [N], equal where the group is; None without groups.

    An image without a group (null or "") is a cluster of its own. A table in which no two
    images share a group has no groups.
    """
    if "group" not in table.column_names:
        return None
    column = pc.fill_null(table["group"].combine_chunks(), "")
    codes = column.dictionary_encode().indices.to_numpy().astype(np.int64)
    alone = pc.equal(column, "").to_numpy(zero_copy_only=False)
    codes[alone] = len(codes) + np.arange(alone.sum())
    _, codes = np.unique(codes, return_inverse=True)
    return codes if len(codes) and codes.max() + 1 < len(codes) else None


def probabilities(table: pa.Table) -> NDArray[np.float32]:
    """Generator probabilities, float32 [N, G], in the order of the label space."""
    generators, _ = label_spaces(table)
    return np.stack([table[probability_column(name)].to_numpy() for name in generators], axis=1)


def label_indices(table: pa.Table, column: str, names: Sequence[str]) -> NDArray[np.int64]:
    """A column of names as positions in `names`: int64 [N], -1 where null or not in it."""
    positions = pc.index_in(table[column], value_set=pa.array(names, pa.string()))
    return pc.fill_null(positions, -1).to_numpy().astype(np.int64)


def build_table(arrays: PredictionArrays) -> pa.Table:
    """Make the table, sorted by sample id.

    p_fake is the sum of the probabilities of all generators except nature: 1 - P(nature),
    but without loss of precision where P(nature) is almost 1.

    Raises:
        UserError: repeated or missing sample ids, invalid probabilities, labels
            outside their space, arrays of different lengths.
    """
    a = arrays
    generators, objects = tuple(a.generators), tuple(a.objects)
    _check_label_spaces("predictions", generators, objects, a.unseen)
    true_names = (*generators, *a.unseen)
    count, top = len(a.sample_id), min(TOP, len(objects))
    _check_shapes(a, count, top)
    order = np.argsort(a.sample_id, kind="stable")
    _check_ids(a.sample_id[order])
    p = np.asarray(a.generator_probability, np.float64)[order]
    _check_probabilities("predictions", p, a.sample_id[order])
    _check_range("generator", a.generator, 0, len(true_names))
    _check_range("object", a.object, -1, len(objects))
    best = a.object_top5[order, :top]
    _check_range("object_top5", best, 0, len(objects))

    known = a.object[order] >= 0
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array(a.sample_id[order], pa.int64()),
        "key": pa.array([a.key[i] for i in order], pa.string()),
        "generator": _names(a.generator[order], true_names),
        "generator_pred": _names(p.argmax(1), generators),
        "object": _names(a.object[order], objects, mask=~known),
        "object_pred": _names(best[:, 0], objects) if top else pa.nulls(count, pa.string()),
        "p_fake": pa.array(np.clip(p[:, 1:].sum(1), 0.0, 1.0), pa.float64()),
    }
    for index, name in enumerate(generators):
        columns[probability_column(name)] = pa.array(p[:, index].astype(np.float32), pa.float32())
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * top, pa.int32())
    # Parquet names a list's items "element": the table must equal itself when read back.
    names = pa.list_(pa.field("element", pa.string()))
    columns["object_top5"] = pa.ListArray.from_arrays(offsets, _names(best.reshape(-1), objects), type=names)
    if a.group is not None:
        columns["group"] = pa.array([a.group[i] for i in order], pa.string())
    if a.identity is not None:
        columns["identity"] = pa.array([a.identity[i] for i in order], pa.string())
    values = {"generators": generators, "objects": objects, "checkpoint": a.checkpoint}
    if a.data:
        values["data"] = a.data
    if a.unseen:
        values["unseen"] = tuple(a.unseen)
    metadata = {f"telltale.{key}": json.dumps(value) for key, value in values.items()}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_predictions(path: str | Path, table: pa.Table) -> None:
    """Write the table as Parquet, atomically; an existing file is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path, hint="choose another folder"):
        atomic.write_with(Path(path), lambda temporary: pq.write_table(table, temporary))


def read_predictions(path: str | Path) -> pa.Table:
    """Read a table that `write_predictions` wrote.

    Raises:
        UserError: missing, not Parquet, not a predictions table, columns that do not match
            its label spaces, a repeated sample or an invalid probability.
    """
    try:
        if os.path.isdir(path):
            raise UserError(
                f"{path}: is a folder, expected a file such as {Path(path) / 'predictions.parquet'}"
            )
        # `read_table` would read columns out of folder names such as "a=b".
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; write one with `telltale evaluate`") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({one_line(error)}); write it again") from None
    _check_table(str(path), table)
    return table


def _metadata(table: pa.Table, key: str, default: Any = None) -> Any:
    value = (table.schema.metadata or {}).get(f"telltale.{key}".encode())
    if value is None and default is None:
        raise KeyError(f"telltale.{key}")
    return default if value is None else json.loads(value)


def _names(
    indices: NDArray[np.int64], names: Sequence[str], mask: NDArray[np.bool_] | None = None
) -> pa.Array:
    coded = pa.array(np.where(mask, 0, indices) if mask is not None else indices, pa.int32(), mask=mask)
    return pa.DictionaryArray.from_arrays(coded, pa.array(names, pa.string())).cast(pa.string())


def _check_label_spaces(
    where: str, generators: Sequence[str], objects: Sequence[str], unseen: Sequence[str] = ()
) -> None:
    if not generators or generators[0] != "nature":
        first = repr(generators[0]) if generators else "nothing"
        raise UserError(f"{where}: the label space of generators starts with {first}, expected 'nature'")
    columns = [probability_column(name) for name in (*generators, *unseen)]
    for kind, names in (("generators", columns), ("objects", list(objects))):
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"{where}: {twice!r} occurs twice in the label space of {kind}; names must be unique"
            )


def _check_shapes(arrays: PredictionArrays, count: int, top: int) -> None:
    expected = {
        "key": (count,),
        "generator": (count,),
        "object": (count,),
        "generator_probability": (count, len(arrays.generators)),
    }
    shapes = {name: np.shape(getattr(arrays, name)) for name in expected}
    shapes["key"] = (len(arrays.key),)
    for name in ("group", "identity"):
        if (column := getattr(arrays, name)) is not None:
            expected[name], shapes[name] = (count,), (len(column),)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"predictions: {name} has shape {list(shapes[name])}, expected {list(shape)}")
    shape = np.shape(arrays.object_top5)
    # A head without objects still has one output, which is meaningless.
    if len(shape) != 2 or shape[0] != count or (top and shape[1] != top):
        raise UserError(f"predictions: object_top5 has shape {list(shape)}, expected {[count, top]}")


def _check_ids(ids: NDArray[np.int64]) -> None:
    """`ids` int64 [N], sorted."""
    expected = np.arange(len(ids))
    if np.array_equal(ids, expected):
        return
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise UserError(
            f"predictions: sample {repeated[0]} occurs more than once, expected every sample once"
        )
    missing = int(expected[ids != expected][0])
    raise UserError(f"predictions: sample {missing} is missing, expected every sample of the split once")


def _check_probabilities(where: str, p: NDArray[Any], ids: NDArray[np.int64]) -> None:
    with np.errstate(invalid="ignore"):
        good = (p >= 0).all(1) & (p <= 1 + _SUM_TOLERANCE).all(1) & (np.abs(p.sum(1) - 1) <= _SUM_TOLERANCE)
    if not good.all():
        row = int(np.argmin(good))
        values = ", ".join(f"{value:.4g}" for value in p[row, :10])
        raise UserError(
            f"{where}: the generator probabilities of sample {ids[row]} are [{values}], expected numbers "
            "in [0, 1] that sum to 1; did the training diverge?"
        )


def _check_range(name: str, labels: NDArray[np.int64], low: int, size: int) -> None:
    bad = (labels < low) | (labels >= size)
    if bad.any():
        raise UserError(f"predictions: {name} holds label {labels[bad][0]}, expected {low} to {size - 1}")


def _check_table(where: str, table: pa.Table) -> None:
    metadata = table.schema.metadata or {}
    for key in ("generators", "objects", "checkpoint"):
        if f"telltale.{key}".encode() not in metadata:
            raise UserError(f"{where}: telltale.{key} is not in its metadata; is it a table of predictions?")
    generators, objects = label_spaces(table)
    unseen = unseen_generators(table)
    _check_label_spaces(where, generators, objects, unseen)
    names = ["sample_id", "key", "generator", "generator_pred", "object", "object_pred", "p_fake"]
    expected = [*names, *map(probability_column, generators), "object_top5"]
    for name in ("group", "identity"):
        if name in table.column_names:
            if not pa.types.is_string(table[name].type):
                raise UserError(f"{where}: column {name} holds {table[name].type}, expected strings or nulls")
            expected.append(name)
    if "identity" in table.column_names and table["identity"].null_count:
        raise UserError(f"{where}: {table['identity'].null_count} rows have no identity; write it again")
    if table.column_names != expected:
        odd = sorted(set(table.column_names) ^ set(expected)) or ["their order"]
        raise UserError(
            f"{where}: its columns do not match its label space of generators [{', '.join(generators)}] "
            f"(differing: {', '.join(odd)}); write it again"
        )
    if table["sample_id"].null_count:
        raise UserError(f"{where}: {table['sample_id'].null_count} rows have no sample_id; write it again")
    ids = table["sample_id"].to_numpy()
    if len(np.unique(ids)) != len(ids):
        raise UserError(f"{where}: a sample occurs more than once; write it again")
    _check_probabilities(where, probabilities(table), ids)
    p_fake = table["p_fake"].to_numpy()
    if not ((p_fake >= 0) & (p_fake <= 1)).all():
        raise UserError(f"{where}: p_fake holds a value outside [0, 1]; write it again")
    spaces = (
        ("generator", (*generators, *unseen), 0),
        ("generator_pred", generators, 0),
        ("object", objects, 1),
    )
    for column, space, may_be_null in spaces:
        unknown = (label_indices(table, column, space) < 0).sum() - may_be_null * table[column].null_count
        if unknown:
            raise UserError(
                f"{where}: {unknown} rows of column {column} hold names outside the label space "
                f"[{', '.join(space[:10])}{', ...' if len(space) > 10 else ''}]; write it again"
            )
