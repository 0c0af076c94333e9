"""Duplicate images by their decoded pixels, and near-duplicates by a perceptual hash.

Fingerprints are computed while images are sharded, when they are decoded anyway, and compared
when the folder is finished. An image that is in two splits makes a test figure too good, so
that is an error unless it is allowed; near-duplicates are a report, never an error.
"""

import csv
import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.layouts.base import SPLITS
from dataio.sharding.plan import ShardPlan, read_task

DUPLICATES = "duplicates.csv"
# One row per image: `key` is its position in the plan, `pixels` a BLAKE2b of size and RGB
# pixels, `look` the 64-bit perceptual hash, `small` whether the latter means nothing.
FINGERPRINT = np.dtype([("key", "<u8"), ("pixels", "<u8", 2), ("look", "<u8"), ("small", "?")])

NEAR_DISTANCE = 3  # of 64 bits: one less than the bands below, so none is missed
_BANDS = 4
_LEAST_SIDE = 32  # pixels: what the hash shrinks to; below, it would invent frequencies
_CROWD = 2_000  # plain images fill one band's bucket; larger ones are not compared
_LISTED = 10_000  # pairs of each kind in the file


def image_fingerprint(image: Image.Image) -> tuple[tuple[int, int], int, bool]:
    """(pixels, look, small) of an 8-bit RGB image.

    The look is Zauner's pHash (2010): signs of the lowest 8 x 8 cosine coefficients.
    """
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    high, low = (int.from_bytes(part, "little") for part in (digest.digest()[:8], digest.digest()[8:]))
    if min(image.size) < _LEAST_SIDE:
        return (high, low), 0, True
    bits = imagehash.phash(image).hash.ravel()
    return (high, low), int("".join("1" if bit else "0" for bit in bits), 2), False


@dataclass(frozen=True)
class Pairs:
    """Duplicates as keys of the plan: int64 [P] each, the smaller key first; sorted."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.int64]


def exact_pairs(rows: NDArray[np.void]) -> Pairs:
    """Each image with the first of equal pixels."""
    if len(rows) == 0:
        return _sorted(*(np.zeros(0, np.int64) for _ in range(3)))
    rows = rows[np.lexsort((rows["key"], rows["pixels"][:, 1], rows["pixels"][:, 0]))]
    same = (rows["pixels"][1:] == rows["pixels"][:-1]).all(1)
    group = np.concatenate([[0], np.cumsum(~same)])
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    keys = rows["key"].astype(np.int64)
    repeated = np.flatnonzero(np.concatenate([[False], same]))
    return _sorted(keys[starts[group[repeated]]], keys[repeated], np.zeros(len(repeated), np.int64))


def near_pairs(rows: NDArray[np.void]) -> tuple[Pairs, int]:
    """Images whose looks differ in at most NEAR_DISTANCE bits and whose pixels differ.

    Two hashes that differ in 3 bits agree in one of 4 bands of 16, so only images that share
    a band are compared.

    Returns:
        the pairs, and how many images were not compared to all such: too many share a band.
    """
    rows = rows[~rows["small"]]
    crowded = np.zeros(len(rows), bool)
    parts: list[NDArray[np.int64]] = [np.zeros((0, 3), np.int64)]
    for band in range(_BANDS):
        bucket = (rows["look"] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(bucket, kind="stable")
        ends = np.flatnonzero(np.diff(bucket[order])) + 1
        for members in np.split(order, ends):
            if len(members) > _CROWD:
                crowded[members] = True
            elif len(members) > 1:
                parts.append(_close(rows[members]))
    pairs = np.unique(np.concatenate(parts), axis=0)
    return _sorted(pairs[:, 0], pairs[:, 1], pairs[:, 2]), int(crowded.sum())


def _close(rows: NDArray[np.void]) -> NDArray[np.int64]:
    """(key, key, distance) int64 [P, 3] of the near pairs within one bucket."""
    look, pixels, keys = rows["look"], rows["pixels"], rows["key"].astype(np.int64)
    distance = np.bitwise_count(look[:, None] ^ look[None, :])
    first, second = np.nonzero(np.triu(distance <= NEAR_DISTANCE, 1))
    differ = (pixels[first] != pixels[second]).any(1)
    first, second = first[differ], second[differ]
    low, high = np.minimum(keys[first], keys[second]), np.maximum(keys[first], keys[second])
    return np.stack([low, high, distance[first, second].astype(np.int64)], axis=1)


def _sorted(first: NDArray[np.int64], second: NDArray[np.int64], distance: NDArray[np.int64]) -> Pairs:
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], distance[order])


def report_duplicates(
    output: Path, work: Path, plan: ShardPlan, rows: NDArray[np.void], *, allowed: bool
) -> dict[str, int]:
    """Write OUTPUT/duplicates.csv and count what is in it.

    Args:
        work: where the plan lies. rows: FINGERPRINT [N] of every image that was written.
        allowed: images may be in two splits.

    Returns:
        counts for the manifest: exact, exact_across_splits, near, near_across_splits (pairs),
        near_not_compared (images).

    Raises:
        UserError: an image is in two splits and that is not allowed; the file is written.
    """
    starts = [task.first_key for task in plan.tasks]
    splits = np.array([SPLITS.index(task.split) for task in plan.tasks])

    def across(pairs: Pairs) -> NDArray[np.bool_]:
        first, second = (
            splits[np.searchsorted(starts, keys, "right") - 1] for keys in (pairs.first, pairs.second)
        )
        return np.asarray(first != second)

    counts: dict[str, int] = {}
    lines: list[list[Any]] = []
    worst = ""
    near, not_compared = near_pairs(rows)
    for kind, pairs in (("exact", exact_pairs(rows)), ("near", near)):
        crossing = across(pairs)
        counts[kind], counts[f"{kind}_across_splits"] = len(pairs.first), int(crossing.sum())
        # What crosses splits first: it is what a reader must see.
        chosen = np.argsort(~crossing, kind="stable")[:_LISTED]
        sources = _sources(work, plan, starts, np.concatenate([pairs.first[chosen], pairs.second[chosen]]))
        for number in chosen:
            ends = [sources[int(key)] for key in (pairs.first[number], pairs.second[number])]
            lines.append([kind, int(pairs.distance[number]), *ends[0], *ends[1]])
        if kind == "exact" and crossing.any():
            (split_a, _, path_a), (split_b, _, path_b) = lines[0][2:5], lines[0][5:8]
            worst = f"{path_a} ({split_a}) is {path_b} ({split_b})"
    counts["near_not_compared"] = not_compared
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("kind", "distance", "split_a", "key_a", "source_a", "split_b", "key_b", "source_b")
    writer.writerows([columns, *lines])
    write_text(output / DUPLICATES, text.getvalue())
    if worst and not allowed:
        count = counts["exact_across_splits"]
        raise UserError(
            f"{output}: {count} image{'s are' if count > 1 else ' is'} in two splits, pixel for pixel: {worst}; "
            f"the list is {output / DUPLICATES}. Remove them from the source, or accept them with "
            "allow_duplicates (--allow-duplicates)"
        )
    return counts


def _sources(
    work: Path, plan: ShardPlan, starts: list[int], keys: NDArray[np.int64]
) -> dict[int, tuple[str, str, str]]:
    """{key: (split, key as in the tars, path)} of some images, shard by shard."""
    keys_by_task: dict[int, list[int]] = {}
    for key in sorted(set(keys.tolist())):
        keys_by_task.setdefault(bisect_right(starts, key) - 1, []).append(key)
    return dict(_named(work, plan, keys_by_task))


def _named(
    work: Path, plan: ShardPlan, keys_by_task: dict[int, list[int]]
) -> Iterator[tuple[int, tuple[str, str, str]]]:
    for number, keys in keys_by_task.items():
        task, left = plan.tasks[number], set(keys)
        for key, (path, *_) in enumerate(read_task(work, task), task.first_key):
            if key in left:
                yield key, (task.split, f"{key:09d}", path)
