"""Which images two evaluations have in common, by what the images are and not by where they stand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataio.core.errors import UserError
from engines.evaluate.predictions import data_info, identities

LEAST_COMMON = 20
"""Images that evaluations of partly different images must share to be compared."""

_LABELS = ("generator", "object")
_SAME = "compare evaluations of the same images"


@dataclass(frozen=True)
class Side:
    """One of the two detectors: its name for sentences and its predictions table."""

    name: str
    table: pa.Table


@dataclass(frozen=True)
class Pairing:
    """The common images of two evaluations.

    Attributes:
        a, b: rows of the two tables; row i of both is the same image.
        paired_by: "source" or "stored" (digests of files, or of shards' images), or "key" (places in
            the shards, where a table does not identify its images).
        left_out: images of a and of b that the other lacks.
        notes: warnings for the user, one line each.
    """

    a: pa.Table
    b: pa.Table
    paired_by: str
    left_out: tuple[int, int]
    notes: tuple[str, ...]


def pair_images(a: Side, b: Side) -> Pairing:
    """Bring two tables of predictions into one order of their common images.

    Where both identify their images alike, that decides: the order in the shards, their names and
    the codec policy do not matter, and the result is in the order of the identities. An image
    that occurs several times is paired as often as both have it.

    Raises:
        UserError: no common images, or fewer than `LEAST_COMMON` where some are left out; images
            whose labels differ; without identities, tables that are not of the same places.
    """
    infos = data_info(a.table), data_info(b.table)
    notes = [note for side, info in zip((a, b), infos, strict=True) for note in _codec_notes(side, info)]
    kinds = [
        info.get("identity", "source") if identities(side.table) is not None else None
        for side, info in zip((a, b), infos, strict=True)
    ]
    if kinds[0] == kinds[1] and kinds[0] is not None:
        left, right, left_out = _by_identity(a, b, infos)
        if any(left_out):
            notes.append(
                f"only the {left.num_rows} images that both have are compared; {left_out[0]} of {a.name} and "
                f"{left_out[1]} of {b.name} are left out"
            )
        return Pairing(left, right, str(kinds[0]), left_out, tuple(notes))
    digests = [info.get("plan_sha256") for info in infos]
    if all(digests) and digests[0] != digests[1]:
        raise UserError(
            f"{b.name}: its images cannot be found in {a.name}: {_of(infos[0])} and {_of(infos[1])} identify images "
            f"differently and were not sharded from the same list; shard the older folder again, or {_SAME}"
        )
    left, right = (side.table.sort_by("sample_id") for side in (a, b))
    _check_same_places(Side(a.name, left), Side(b.name, right))
    older = " and ".join(side.name for side, kind in zip((a, b), kinds, strict=True) if kind is None)
    why = f"{older}: does not identify its images" if older else "the two identify their images differently"
    notes.append(
        f"{why}, so only places and labels were compared: make sure that both are of the same images, or "
        "shard and evaluate again"
    )
    return Pairing(left, right, "key", (0, 0), tuple(notes))


def _codec_notes(side: Side, info: Mapping[str, Any]) -> list[str]:
    differences = info.get("codec_differences")
    return (
        [f"{side.name}: of images coded differently than its training's ({'; '.join(differences)})"]
        if differences
        else []
    )


def _of(info: Mapping[str, Any]) -> str:
    return f"{info.get('folder', 'unknown data')} ({info.get('split', '?')} split)"


def _by_identity(
    a: Side, b: Side, infos: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> tuple[pa.Table, pa.Table, tuple[int, int]]:
    images, keys = _keys(a.table, b.table)
    _, first, second = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    alone = [
        np.setdiff1d(np.arange(len(key)), found) for key, found in zip(keys, (first, second), strict=True)
    ]
    disputed, left, right = np.intersect1d(images[0][alone[0]], images[1][alone[1]], return_indices=True)
    if len(disputed):
        one, two = (
            ", ".join(str(table[column][int(row)].as_py()) for column in ("key", *_LABELS))
            for table, row in ((a.table, alone[0][left[0]]), (b.table, alone[1][right[0]]))
        )
        raise UserError(
            f"{b.name}: {len(disputed)} images have other labels than in {a.name} (key, generator, object: {two}; "
            f"there {one}); compare evaluations with the same labels"
        )
    left_out = len(alone[0]), len(alone[1])
    if any(left_out) and len(first) < LEAST_COMMON:
        common = f"only {len(first)} of its images are" if len(first) else "none of its images is"
        raise UserError(
            f"{b.name}: predictions of other images than {a.name} has: {common} among them ({_of(infos[1])}, "
            f"{_of(infos[0])}); {_SAME}"
        )
    return a.table.take(first), b.table.take(second), left_out


def _keys(a: pa.Table, b: pa.Table) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Each row's image as a number, and as one that no other row of its table has, int64 [N] each of both tables.

    The second one tells the occurrences of an image apart, in the order of their labels: both tables
    count alike, in whatever order their rows are.
    """
    images = _codes(a, b, "identity")
    groups = images
    for column in _LABELS:
        codes = _codes(a, b, column)
        groups = groups * (int(codes.max(initial=0)) + 1) + codes
    sides = [slice(0, a.num_rows), slice(a.num_rows, None)]
    counts = [
        _occurrence(groups[side], table["sample_id"].to_numpy())
        for side, table in zip(sides, (a, b), strict=True)
    ]
    most = max(int(count.max(initial=0)) for count in counts) + 1
    keys = [groups[side] * most + count for side, count in zip(sides, counts, strict=True)]
    return [images[side] for side in sides], keys


def _codes(a: pa.Table, b: pa.Table, column: str) -> NDArray[np.int64]:
    """A column of strings of both tables as numbers in the order of the strings, int64 [A + B]."""
    values = np.array([value or "" for table in (a, b) for value in table[column].to_pylist()], np.str_)
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _occurrence(groups: NDArray[np.int64], sample_id: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of the same group come before each in the order of the samples, int64 [N]."""
    order = np.lexsort((sample_id, groups))
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return number


def _first_difference(left: pa.Table, right: pa.Table, column: str) -> int | None:
    pairs = zip(left[column].to_pylist(), right[column].to_pylist(), strict=True)
    return next((row for row, pair in enumerate(pairs) if pair[0] != pair[1]), None)


def _check_same_places(a: Side, b: Side) -> None:
    """Both tables sorted by sample id."""
    ids = [side.table["sample_id"].to_numpy() for side in (a, b)]
    odd = np.setxor1d(*ids)
    if len(odd):
        raise UserError(
            f"{b.name}: predictions of other images than {a.name} has ({len(odd)} samples in only one of "
            f"them, such as {odd[0]}); compare evaluations of the same split of the same shards"
        )
    for column in ("key", *_LABELS):
        row = _first_difference(a.table, b.table, column)
        if row is not None:
            right, left = b.table[column][row].as_py(), a.table[column][row].as_py()
            raise UserError(
                f"{b.name}: predictions of other images than {a.name} has (sample {ids[0][row]} has {column} "
                f"{right!r}, not {left!r}); compare evaluations of the same split of the same shards"
            )
