"""The sample index: where each encoded image lies in the tars, and its labels."""

import json
import tarfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.shards.local_cache import CacheOptions
from dataio.shards.manifest import IDENTITY, NOT_AN_ARRAY, SAMPLE, LabelSpaces, read_manifest, sha256_of
from dataio.shards.manifest_schema import index_fault
from dataio.shards.paged_index import PagedIndex
from dataio.shards.remote_cache import default_cache, default_cap, small_file
from dataio.shards.remote_folder import check_remote_files, open_cache
from dataio.shards.shard_table import ShardTable, shard_counts
from dataio.shards.tar_reader import TAR_BLOCK, DamagedSample, TarReader, Unreadable, check_shard_file
from dataio.sources.remote_path import PATIENCE, RemotePath, place_of
from dataio.sources.source import IDENTITY_BYTES, identity_of

CHECKED_ON_OPEN = 1 << 22  # rows: a larger index is validated page by page as it is read


class ShardSet:
    """One split of a shard folder, opened for reading by sample id.

    A sample id is a row of the split's index (of the selected rows, where `subsets` or
    `generators` select; photographs belong to every selection of generators). The label
    spaces are always the folder's. Opening checks the size of every tar and
    index against the manifest, and with `verify` their SHA-256, so that a stale or truncated file is
    reported before the first step. Where the shards are in a table, a tar is checked when it is first
    opened instead: two million stat calls take minutes.

    A folder behind a URL is read through copies (`cache`, or a folder of the user's): every one is
    hashed, and names and sizes are compared on opening where the server lists them.

    Attributes:
        folder: a local path, or a `RemotePath`.
        rows: structured array [N] of dtype SAMPLE.
        shard_sizes: int64 [shards], selected samples in each shard.
        labels: the label spaces.
        identified_by: what `identities` are of: "source" (the source's file), or "stored" (the
            image in the shard) in folders written before sources' identities were kept.

    Raises:
        UserError: missing, truncated or changed files; an unknown split, subset or generator; a
            cache folder that cannot be written.
    """

    def __init__(
        self,
        folder: str | Path | RemotePath,
        split: str,
        *,
        subsets: Sequence[str] = (),
        generators: Sequence[str] = (),
        verify: bool = False,
        cache: CacheOptions | None = None,
    ) -> None:
        self.folder, self.split = place_of(folder, PATIENCE if cache is None else cache.patience), split
        if cache is None and isinstance(self.folder, RemotePath):
            cache = CacheOptions(default_cache(), default_cap(default_cache()))
        self._cache = None if cache is None else cache.folder
        self.manifest = read_manifest(self.folder, self._cache)
        self.labels = LabelSpaces.of(self.manifest)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder}: no split {split!r}; there are {', '.join(self.manifest['splits'])}")
        entry = self.manifest["splits"][split]
        self.shards: Sequence[dict[str, Any]] = entry["shards"]
        self._tabled = isinstance(self.shards, ShardTable)
        self._whole = not subsets and not generators
        self._check_files(entry, verify)
        rows = self._load_rows(entry["index"], SAMPLE, entry["samples"])
        self._identities: PagedIndex | NDArray[np.void] | None = None
        self.identified_by = "source" if "identities" in entry else "stored"
        self._chosen: NDArray[np.int64] | None = None  # rows of the split, where not all are selected
        if not self._whole:
            chosen = np.ones(len(rows), bool)
            if subsets:
                chosen &= np.isin(rows["subset"], self._subset_numbers(subsets))
            if generators:
                chosen &= np.isin(rows["generator"], self._generator_numbers(generators))
            rows, self._chosen = rows[chosen], np.flatnonzero(chosen)
        if len(rows) == 0:
            asked = f" in subsets {', '.join(subsets)}" if subsets else ""
            asked += f" of generators {', '.join(generators)}" if generators else ""
            raise UserError(
                f"{folder}: the {split} split has no samples{asked}; choose another split or shard more"
            )
        self.rows: PagedIndex | NDArray[np.void] = rows
        # The manifest has the counts of the whole split; a large index need not be read.
        self.shard_sizes = (
            shard_counts(self.shards, "samples")
            if self._whole
            else np.bincount(rows["shard"], minlength=len(self.shards)).astype(np.int64)
        )
        self.tars = TarReader(
            self.folder,
            self.shards,
            None if cache is None else open_cache(cache, self.folder, self.shards),
            strict=cache is None or cache.strict,
            check=self._tabled and not isinstance(self.folder, RemotePath),
        )

    @cached_property
    def missing_class(self) -> str:
        """What the selected images lack: "photographs" or "fakes"; "" where they have both."""
        if self._whole:
            counts = self.manifest["splits"][self.split]["generators"]
            real = counts.get(self.labels.generators[0], 0)
        else:
            real = int(np.count_nonzero(self.rows["generator"] == 0))
        return "" if 0 < real < len(self) else "fakes" if real else "photographs"

    def _subset_numbers(self, subsets: Sequence[str]) -> list[int]:
        known = self.manifest["subsets"]
        unknown = [name for name in subsets if name not in known]
        if unknown:
            raise UserError(
                f"{self.folder}: no subset {unknown[0]!r}; there are {', '.join(known)} (data.subsets)"
            )
        return [known.index(name) for name in subsets]

    def _generator_numbers(self, generators: Sequence[str]) -> list[int]:
        known = self.labels.generators
        unknown = [name for name in generators if name not in known]
        if unknown:
            raise UserError(
                f"{self.folder}: no generator {unknown[0]!r}; there are {', '.join(known)} (data.generators)"
            )
        return [0, *(known.index(name) for name in generators)]

    def _check_files(self, entry: dict[str, Any], verify: bool) -> None:
        if isinstance(self.folder, RemotePath):
            check_remote_files(self.folder, self.split, self.shards, verify, self._tabled)
            return
        tables = [entry["index"], *([entry["identities"]] if "identities" in entry else [])]
        files = [(table["file"], table["bytes"], table["sha256"]) for table in tables]
        for shard in self.shards if verify or not self._tabled else ():
            files.append((shard["file"], shard["bytes"], shard["sha256"]))
            files.append(
                (str(Path(shard["file"]).with_suffix(".idx")), shard["idx_bytes"], shard["idx_sha256"])
            )
        for name, size, digest in files:
            path = self.folder / name
            check_shard_file(path, size)
            if verify and sha256_of(path) != digest:
                raise UserError(
                    f"{path}: its SHA-256 is not the manifest's: changed; copy it again or re-shard"
                )

    def _load_rows(
        self, file: dict[str, Any], dtype: np.dtype[np.void], samples: int
    ) -> PagedIndex | NDArray[np.void]:
        """The split's index or identities."""
        path = small_file(self.folder / file["file"], file["bytes"], file["sha256"], self._cache)
        try:
            # Mapped for its header only.
            rows = np.load(path, mmap_mode="r" if samples else None)
        except NOT_AN_ARRAY as error:
            raise UserError(
                f"{path}: not a sample index ({' '.join(str(error).split())}); re-shard"
            ) from None
        if not isinstance(rows, np.ndarray):
            raise UserError(f"{path}: not a sample index; re-shard")
        if rows.dtype != dtype or rows.shape != (samples,):
            raise UserError(
                f"{path}: {rows.shape} of {rows.dtype}, expected ({samples},) of the sample type; re-shard"
            )
        if not isinstance(rows, np.memmap):
            return rows  # none
        if dtype == IDENTITY:  # any bytes are an identity
            return PagedIndex(path, dtype, len(rows), rows.offset, lambda rows: "")
        fault = partial(
            index_fault,
            shards=len(self.shards),
            generators=len(self.labels.generators),
            subsets=len(self.manifest["subsets"]),
            objects=len(self.labels.objects),
        )
        opened = PagedIndex(path, SAMPLE, len(rows), rows.offset, fault)
        if len(rows) <= CHECKED_ON_OPEN:
            for _ in opened.chunks():
                pass
        return opened

    def __len__(self) -> int:
        return len(self.rows)

    def objects_alike(self) -> bool | None:
        """Whether the object is known of all samples (True) or of none (False), by the manifest; None: mixed."""
        entry = self.manifest["splits"][self.split]
        known = entry.get("objects_known") if self._whole else None
        return {0: False, entry["samples"]: True}.get(known) if isinstance(known, int) else None

    def image_sizes(self) -> tuple[int, int, int, int]:
        """(smallest width, largest width, smallest height, largest height), pixels."""
        entry = self.manifest["splits"][self.split]
        if self._whole and "smallest" in entry:
            low, high = entry["smallest"], entry["largest"]  # no need to read every row
            return low["width"], high["width"], low["height"], high["height"]
        width, height = self.rows["width"], self.rows["height"]
        return int(width.min()), int(width.max()), int(height.min()), int(height.max())

    def sizes(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Widths and heights of samples, int64 [len(ids)] each, pixels."""
        entry = self.manifest["splits"][self.split]
        low, high = entry.get("smallest", {}), entry["largest"]
        width, height = high["width"], high["height"]
        if (low.get("width"), low.get("height")) == (width, height):  # no need to read the index
            return np.full(len(ids), width, np.int64), np.full(len(ids), height, np.int64)
        rows = self.rows[ids]
        return rows["width"].astype(np.int64), rows["height"].astype(np.int64)

    def read(self, sample_id: int) -> NDArray[np.uint8]:
        """The encoded bytes of one image, uint8 [size].

        Raises:
            DamagedSample: they cannot be read, or the tar has another file there.
        """
        row = self.rows[sample_id]
        try:
            data = self.tars.member(int(row["shard"]), int(row["key"]), int(row["offset"]), int(row["size"]))
        except Unreadable as error:
            raise self.damaged(sample_id, str(error)) from None
        return np.frombuffer(data, np.uint8)

    def read_many(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The encoded bytes of some images, each uint8 [size]; as `read` of each, but faster.

        Raises:
            DamagedSample: the first of them that cannot be read.
        """
        rows = self.rows[ids]
        columns = (rows[name].tolist() for name in ("shard", "key", "offset", "size"))
        images = []
        for place, where in enumerate(zip(*columns, strict=True)):
            try:
                images.append(self.tars.view(*where))
            except Unreadable as error:
                raise self.damaged(int(ids[place]), str(error)) from None
        return images

    def identities(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What some images are known by wherever they are, uint8 [len(ids), 16]; see `identified_by`.

        Raises:
            DamagedSample: an image must be read for it, and cannot be.
        """
        entry = self.manifest["splits"][self.split]
        if self.identified_by == "stored":
            digests = b"".join(identity_of(image.tobytes()) for image in self.read_many(ids))
            return np.frombuffer(digests, np.uint8).reshape(len(ids), IDENTITY_BYTES)
        if self._identities is None:
            self._identities = self._load_rows(entry["identities"], IDENTITY, entry["samples"])
        return self._identities[ids if self._chosen is None else self._chosen[ids]]["identity"]

    def about(self, sample_id: int) -> dict[str, Any]:
        """A sample's JSON: generator, object, source (its path under the layout's root).

        Raises:
            DamagedSample: it cannot be read.
        """
        row = self.rows[sample_id]
        # It is the tar's next member: a header, then its text.
        header = int(row["offset"]) + -(-int(row["size"]) // TAR_BLOCK) * TAR_BLOCK
        try:
            block = self.tars.read(int(row["shard"]), header, TAR_BLOCK)
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            record = json.loads(
                self.tars.member(int(row["shard"]), int(row["key"]), header + TAR_BLOCK, info.size)
            )
            if not isinstance(record, dict):
                raise ValueError("not an object")
            return record
        except (Unreadable, tarfile.TarError, ValueError, RecursionError) as error:
            place = self.describe(sample_id)
            raise DamagedSample(
                f"{place}: its JSON cannot be read ({error}); {self._hint()}", str(error)
            ) from None

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: "train/000003.tar key 000012345"."""
        row = self.rows[sample_id]
        return f"{self.folder / self.shards[int(row['shard'])]['file']} key {int(row['key']):09d}"

    def damaged(self, sample_id: int, reason: str) -> DamagedSample:
        """The error that describes a damaged sample: shard, key, offset, and its source if known."""
        try:
            source = str(self.about(sample_id).get("source", ""))
        except DamagedSample:
            source = ""
        offset = int(self.rows[sample_id]["offset"])
        place = f"{self.describe(sample_id)} (byte {offset}{', from ' if source else ''}{source})"
        return DamagedSample(f"{place}: {reason}; {self._hint()}", reason, source)

    def _hint(self) -> str:
        return f"find what changed with `telltale shard verify {self.folder}`"
