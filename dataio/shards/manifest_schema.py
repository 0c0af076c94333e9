"""Validation of a shard folder's manifest and sample index."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Names below the folder; a manifest must not lead its reader elsewhere.
_FILE = re.compile(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+\.(tar|npy)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def manifest_fault(manifest: dict[str, Any]) -> str:
    """What is wrong with a manifest of version 1 or 2, naming the key; "" if nothing is.

    In version 2 a split may have a `table` in place of the list `shards`; see `dataio.shards.shard_table`.
    """
    for key in ("generators", "objects", "subsets"):
        names = manifest.get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"{key} must be a list of strings"
    if not manifest["generators"]:
        return "generators is empty"
    if not isinstance(manifest.get("layout"), str):
        return "layout must be a string"
    codec = manifest.get("codec")
    if not isinstance(codec, dict) or not isinstance(codec.get("preset"), str):
        return "codec has no preset"
    splits = manifest.get("splits")
    if not isinstance(splits, dict):
        return "splits must be an object"
    for name, split in splits.items():
        fault = _split_fault(split, manifest.get("version") == 2)
        if fault:
            return f"splits.{name}{fault}"
    return ""


def _split_fault(split: Any, tables: bool) -> str:
    if not isinstance(split, dict):
        return " must be an object"
    if not _count(split.get("samples")):
        return ".samples must be a non-negative integer"
    index, shards = split.get("index"), split.get("shards")
    if not isinstance(index, dict) or _file_fault(index, ""):
        return f".index{_file_fault(index, '') if isinstance(index, dict) else ' must be an object'}"
    identities = split.get("identities")  # not in earlier folders
    if identities is not None and (not isinstance(identities, dict) or _file_fault(identities, "")):
        return f".identities{_file_fault(identities, '') if isinstance(identities, dict) else ' must be an object'}"
    # Earlier folders do not have the smallest.
    for name in ("largest", "smallest") if "smallest" in split else ("largest",):
        sides = split.get(name)
        if not isinstance(sides, dict) or not all(_count(sides.get(side)) for side in ("width", "height")):
            return f".{name} must have width and height"
    if tables and "table" in split:
        table = split["table"]
        if not isinstance(table, dict) or _file_fault(table, ""):
            return f".table{_file_fault(table, '') if isinstance(table, dict) else ' must be an object'}"
        return "" if _count(table.get("shards")) else ".table.shards must be a non-negative integer"
    if not isinstance(shards, list):
        return ".shards must be a list"
    for number, shard in enumerate(shards):
        fault = _file_fault(shard, "idx_") if isinstance(shard, dict) else " must be an object"
        if not fault and not _count(shard.get("samples")):
            fault = ".samples must be a non-negative integer"
        if fault:
            return f".shards[{number}]{fault}"
    if sum(shard["samples"] for shard in shards) != split["samples"]:
        return ".samples is not the sum over its shards"
    return ""


def _file_fault(entry: dict[str, Any], other: str) -> str:
    name = entry.get("file")
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        return f".file is {name!r}, expected SPLIT/NAME.tar or .npy"
    for prefix in ("", other):
        if not _count(entry.get(f"{prefix}bytes")):
            return f".{prefix}bytes must be a non-negative integer"
        digest = entry.get(f"{prefix}sha256")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return f".{prefix}sha256 must be 64 hexadecimal digits"
    return ""


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def index_fault(rows: NDArray[np.void], shards: int, generators: int, subsets: int, objects: int) -> str:
    """The first column of an index with a value out of range, and the value; "" if there is none.

    Args:
        rows: of dtype `dataio.shards.manifest.SAMPLE`. The others: how many there are of each.
    """
    ranges = {
        "shard": (0, shards),
        "generator": (0, generators),
        "subset": (0, subsets),
        "object": (-1, objects),
        "width": (1, 1 << 16),
        "height": (1, 1 << 16),
    }
    if len(rows) == 0:
        return ""
    for name, (low, end) in ranges.items():
        column = np.ascontiguousarray(rows[name])  # twice over columns of a table is slower
        for value in (int(column.min()), int(column.max())):
            if not low <= value < end:
                return f"{name} is {value}, expected {low} to {end - 1}"
    return ""
