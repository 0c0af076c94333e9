"""A split's list of shards as a binary table, where there are too many for JSON.

A million shards are several hundred MB of JSON, which every process would parse. As a table they
are 92 MB, read and hashed in a fraction of a second. `manifest.json` names the table with its size
and SHA-256, so it is a part of the manifest. To its readers it is a list of the same dicts.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.shards.remote_cache import small_file
from dataio.sources.remote_path import AnyPath

TABLE = "shards.npy"  # in the split's folder
TABLE_FROM = 20_000  # shards of a split; with fewer they stand in manifest.json, where people can read them
# The tar's name follows from `number`, which skips shards that would be empty.
ENTRY = np.dtype(
    [
        ("number", "<u4"),
        ("samples", "<u8"),
        ("bytes", "<u8"),
        ("sha256", "u1", 32),
        ("idx_bytes", "<u8"),
        ("idx_sha256", "u1", 32),
    ]
)
_AT_ONCE = 1 << 16  # entries turned into text together


class ShardTable(Sequence[dict[str, Any]]):
    """The shards of a split, read from its table on first access.

    Args:
        folder: of the shards. entry: the manifest's `table`: file, bytes, sha256 and shards (how many).
        samples: of the split, which the shards' must add up to.
        cache: folder for a copy of a remote table, see `small_file`.

    Raises:
        UserError: (on first access) the table is missing, changed, or not what the manifest says.
    """

    def __init__(
        self, folder: AnyPath, entry: dict[str, Any], samples: int, cache: str | Path | None = None
    ) -> None:
        self.path, self._entry, self._samples = folder / entry["file"], entry, samples
        self._cache = cache
        self._split = str(entry["file"]).partition("/")[0]
        self._loaded: NDArray[np.void] | None = None

    @property
    def entries(self) -> NDArray[np.void]:
        """Of dtype `ENTRY`, [shards]."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> NDArray[np.void]:
        hint = "copy it again or re-shard"
        try:
            local = small_file(self.path, self._entry["bytes"], self._entry["sha256"], self._cache)
            raw = local.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path}: missing, but the manifest lists it; {hint}") from None
        except (OSError, MemoryError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); {hint}") from None
        if len(raw) != self._entry["bytes"]:
            raise UserError(
                f"{self.path}: {len(raw)} bytes, the manifest says {self._entry['bytes']}: truncated or changed; {hint}"
            )
        if hashlib.sha256(raw).hexdigest() != self._entry["sha256"]:
            raise UserError(f"{self.path}: its SHA-256 is not the manifest's: changed; {hint}")
        begin = len(raw) - self._entry["shards"] * ENTRY.itemsize
        # Only exactly this header is accepted; nothing is parsed.
        if begin < 0 or raw[:begin] != table_header(self._entry["shards"]):
            raise UserError(f"{self.path}: not a table of {self._entry['shards']} shards; {hint}")
        table = np.frombuffer(raw, ENTRY, offset=begin)
        for name in ("samples", "bytes", "idx_bytes"):
            largest = int(table[name].max()) if len(table) else 0
            if largest >= 2**63 // max(1, len(table)):
                raise UserError(f"{self.path}: {name} is {largest}, expected a non-negative count; {hint}")
        if int(table["samples"].sum()) != self._samples:
            raise UserError(f"{self.path}: its samples are not the sum that the manifest says; {hint}")
        return table

    def __len__(self) -> int:
        return int(self._entry["shards"])

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(number, slice):
            return [described(self._split, entry) for entry in self.entries[number]]
        return described(self._split, self.entries[number])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (described(self._split, entry) for entry in self.entries)


def described(split: str, entry: Any) -> dict[str, Any]:
    """An entry of a table as a dict of manifest.json."""
    return {
        "file": f"{split}/{int(entry['number']):06d}.tar",
        "samples": int(entry["samples"]),
        "bytes": int(entry["bytes"]),
        "sha256": entry["sha256"].tobytes().hex(),
        "idx_bytes": int(entry["idx_bytes"]),
        "idx_sha256": entry["idx_sha256"].tobytes().hex(),
    }


def table_header(shards: int) -> bytes:
    """The header of a .npy file of this many entries."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": np.lib.format.dtype_to_descr(ENTRY), "fortran_order": False, "shape": (shards,)}
    )
    return stream.getvalue()


def to_entries(shards: Sequence[dict[str, Any]]) -> NDArray[np.void]:
    """The dicts of a manifest's shards as an array of dtype `ENTRY`."""
    entries = np.zeros(len(shards), ENTRY)
    for name in ("samples", "bytes", "idx_bytes"):
        entries[name] = [shard[name] for shard in shards]
    for name in ("sha256", "idx_sha256"):
        digests = bytes.fromhex("".join(shard[name] for shard in shards))
        entries[name] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    entries["number"] = [int(Path(shard["file"]).stem) for shard in shards]
    return entries


def shard_counts(shards: Sequence[dict[str, Any]], name: str) -> NDArray[np.int64]:
    """One of the shards' counts (samples, bytes), int64 [shards]."""
    if isinstance(shards, ShardTable):
        return shards.entries[name].astype(np.int64)
    return np.array([shard[name] for shard in shards], np.int64)


def shard_digests(shards: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tars' SHA-256 in hexadecimal, in order, some of them in each string."""
    if isinstance(shards, ShardTable):
        for start in range(0, len(shards), _AT_ONCE):
            yield shards.entries["sha256"][start : start + _AT_ONCE].tobytes().hex()
    else:
        yield from (shard["sha256"] for shard in shards)
