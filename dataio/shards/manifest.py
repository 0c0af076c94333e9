"""The format of a shard folder: its manifest, label spaces and sample index."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dataio.core.errors import UserError
from dataio.shards.manifest_schema import manifest_fault
from dataio.shards.remote_cache import unreadable
from dataio.shards.shard_table import ShardTable
from dataio.sources.remote_path import PATIENCE, RemotePath, place_of

# One row per sample of a split, in shard order. `offset` and `size` are of the image's
# bytes inside the tar; labels are -1 where unknown; `key` is the position in the plan.
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("generator", "<i2"),
        ("subset", "<i2"),
        ("object", "<i4"),
        ("key", "<u8"),
    ]
)

# One row per sample of a split beside its index, in the same order: `identity_of` the source's file.
# Folders that were written before have none.
IDENTITY = np.dtype([("identity", "u1", 16)])

MANIFEST_FORMAT = "telltale-shards"
VERSIONS = (1, 2)  # that can be read; a folder has 2 where a split has a table of its shards

# What np.load raises of a damaged or foreign file, found by fuzzing.
NOT_AN_ARRAY = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    SyntaxError,
    OverflowError,
    MemoryError,
    TokenError,
    BadZipFile,
)


@dataclass(frozen=True)
class LabelSpaces:
    """What the heads' outputs mean; stored in every manifest and checkpoint.

    Attributes:
        generators: names; index 0 is "nature".
        objects: names.
    """

    generators: tuple[str, ...]
    objects: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "LabelSpaces":
        """The label spaces of a manifest."""
        return cls(tuple(manifest["generators"]), tuple(manifest["objects"]))


def read_manifest(
    folder: str | Path | RemotePath, cache: str | Path | None = None, *, patience: float = PATIENCE
) -> dict[str, Any]:
    """Read DIR/manifest.json.

    A split's `shards` is a sequence of dicts, whether it stands there or in a table.

    Args:
        folder: or its URL. cache, patience: for a URL, see `small_file` and `RemotePath`.

    Raises:
        UserError: no such folder or file, not JSON, or of another format or version.
    """
    place = place_of(folder, patience)
    path = place / "manifest.json"
    if isinstance(place, Path) and not place.is_dir():
        raise UserError(f"{folder}: no such folder of shards; write one with `telltale shard`")
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        unfinished = isinstance(place, Path) and (place / ".work").is_dir()
        hint = "sharding did not finish, run it again" if unfinished else "is it a shard folder?"
        raise UserError(f"{path}: not found; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(path, RemotePath) and isinstance(error, OSError):
            raise unreadable(path, error) from None
        raise UserError(f"{path}: cannot be read ({error}); write the shards again") from None
    file_format = manifest.get("format") if isinstance(manifest, dict) else None
    if file_format != MANIFEST_FORMAT:
        raise UserError(
            f"{path}: format is {file_format!r}, expected {MANIFEST_FORMAT!r}; is it a shard folder?"
        )
    if type(manifest.get("version")) is not int or manifest["version"] not in VERSIONS:
        raise UserError(
            f"{path}: version {manifest.get('version')!r}, this telltale reads versions 1 and 2; update it"
        )
    fault = manifest_fault(manifest)
    if fault:
        raise UserError(f"{path}: {fault}; copy it again or write the shards again")
    for split in manifest["splits"].values():
        if manifest["version"] == 2 and "table" in split:
            split["shards"] = ShardTable(place, split["table"], split["samples"], cache)
    return manifest


def label_mismatch(theirs: Mapping[str, Sequence[str]], ours: LabelSpaces) -> str:
    """What differs between a checkpoint's label spaces and ours, printing both; "" if nothing."""
    for name, names in (("generators", ours.generators), ("objects", ours.objects)):
        if tuple(theirs[name]) != names:
            return f"label space of {name} is {_brief(theirs[name])}, that of the shards is {_brief(names)}"
    return ""


def _brief(names: Sequence[str]) -> str:
    return f"[{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}] ({len(names)})"


def sha256_of(path: str | Path | RemotePath) -> str:
    if isinstance(path, RemotePath):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
