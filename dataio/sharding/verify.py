"""Check a finished shard folder against its manifest, down to every image."""

import concurrent.futures
import json
import multiprocessing
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataio.core.errors import UserError
from dataio.images.opening import MEGAPIXELS, Undecodable, open_image
from dataio.images.training_decoder import training_fault
from dataio.shards.manifest import IDENTITY, NOT_AN_ARRAY, SAMPLE, read_manifest, sha256_of
from dataio.shards.remote_cache import unreadable
from dataio.shards.remote_folder import fetch
from dataio.sources.remote_path import AnyPath, RemotePath, place_of


def verify_shards(folder: str | Path, *, workers: int = 1) -> tuple[int, list[str]]:
    """Check every SHA-256, index, key and image, which the training decoder must show as Pillow does.

    Args:
        folder: written by `dataio.sharding.job.write_shards`, or its URL, whose files are copied to a
            temporary folder one after another. workers: processes.

    Returns:
        the number of images that were checked, and the faults, each naming its file and key.

    Raises:
        UserError: no readable manifest.
    """
    place = place_of(folder)
    if isinstance(place, Path):
        return _verify(place, None, workers)
    with tempfile.TemporaryDirectory(prefix="telltale-verify-") as copies:
        return _verify(Path(copies), place, workers)


def _verify(folder: Path, remote: RemotePath | None, workers: int) -> tuple[int, list[str]]:
    """Check a local folder, or the copies in it of what a remote one has."""
    manifest = read_manifest(folder if remote is None else remote, folder)
    faults: list[str] = []
    jobs: list[_Job] = []
    keys: list[np.ndarray] = []
    spaces = {name: manifest[name] for name in ("generators", "objects", "subsets", "codec")}
    for split, entry in manifest["splits"].items():
        if remote is not None:
            for table in (entry["index"], *([entry["identities"]] if "identities" in entry else [])):
                fetch(remote / table["file"], table["bytes"], folder / table["file"])
        rows = _check_rows(folder, entry["index"], entry["samples"], SAMPLE, faults)
        if "identities" in entry:
            _check_rows(folder, entry["identities"], entry["samples"], IDENTITY, faults)
        if rows is None:
            continue
        keys.append(rows["key"])
        start = 0
        for number, shard in enumerate(entry["shards"]):
            stop = start + shard["samples"]
            if not (rows["shard"][start:stop] == number).all():
                faults.append(
                    f"{entry['index']['file']}: rows {start} to {stop - 1} are not all of {shard['file']}"
                )
            jobs.append((folder, remote, shard, entry["index"]["file"], start, spaces))
            start = stop
        listed = {Path(shard["file"]).name for shard in entry["shards"]}
        for name in _tars(folder if remote is None else remote, split):
            if name not in listed:
                faults.append(f"{split}/{name}: not in the manifest")
    all_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    unique, counts = np.unique(all_keys, return_counts=True)
    faults += [
        f"key {int(key):09d} occurs {count} times"
        for key, count in zip(unique, counts, strict=True)
        if count > 1
    ]
    for shard_faults in _run(jobs, workers):
        faults += shard_faults
    return len(all_keys), faults


def require_intact(folder: str | Path, *, workers: int = 1) -> int:
    """Check a folder as `verify_shards`; returns the number of its images.

    Raises:
        UserError: faults; the first ten are listed.
    """
    checked, faults = verify_shards(folder, workers=workers)
    if faults:
        shown = "; ".join(faults[:10])
        raise UserError(
            f"{folder}: {len(faults)} faults among {checked} images: {shown}. Copy or shard it again"
        )
    return checked


# The folder, where it is copied from, the shard, the index file and the shard's first row in it, the
# manifest's names and codec.
_Job = tuple[Path, RemotePath | None, dict[str, Any], str, int, dict[str, Any]]


def _tars(folder: AnyPath, split: str) -> list[str]:
    """Names of the tars of a split that are there; none where a server lists nothing."""
    if isinstance(folder, Path):
        return sorted(path.name for path in (folder / split).glob("*.tar"))
    try:
        sizes = (folder / split).sizes() or {}
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder / split, error) from None
    return sorted(name for name in sizes if name.endswith(".tar"))


def _run(jobs: list[_Job], workers: int) -> Iterator[list[str]]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_check_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context) as pool:
        yield from pool.map(_check_shard, jobs, chunksize=max(1, min(64, len(jobs) // (4 * workers))))


def _check_file(folder: Path, name: str, size: int, digest: str) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != size:
        return f"{name}: {path.stat().st_size} bytes, the manifest says {size}"
    return "" if sha256_of(path) == digest else f"{name}: its SHA-256 is not the manifest's"


def _check_rows(
    folder: Path, file: dict[str, Any], samples: int, dtype: np.dtype[np.void], faults: list[str]
) -> np.ndarray | None:
    """A split's file with one row per sample; None, and a fault, where it is not that."""
    fault = _check_file(folder, file["file"], file["bytes"], file["sha256"])
    if fault:
        faults.append(fault)
        return None
    try:
        rows = np.load(folder / file["file"], mmap_mode="r" if samples else None)
    except NOT_AN_ARRAY as error:
        faults.append(f"{file['file']}: not a sample index ({error})")
        return None
    if rows.dtype != dtype or len(rows) != samples:
        faults.append(f"{file['file']}: {len(rows)} rows of {rows.dtype}, the manifest says {samples}")
        return None
    return rows


def _check_shard(job: _Job) -> list[str]:
    folder, remote, shard, *_ = job
    if remote is None:
        return _check_copy(job)
    names = {shard["file"]: "bytes", str(Path(shard["file"]).with_suffix(".idx")): "idx_bytes"}
    try:
        for name, size in names.items():
            fetch(remote / name, shard[size], folder / name)
        return _check_copy(job)
    finally:
        for name in names:
            (folder / name).unlink(missing_ok=True)


def _check_copy(job: _Job) -> list[str]:
    folder, _, shard, index, start, spaces = job
    name = shard["file"]
    idx_name = str(Path(name).with_suffix(".idx"))
    faults = [
        fault
        for fault in (
            _check_file(folder, name, shard["bytes"], shard["sha256"]),
            _check_file(folder, idx_name, shard["idx_bytes"], shard["idx_sha256"]),
        )
        if fault
    ]
    if not (folder / name).is_file():
        return faults
    rows = np.load(folder / index, mmap_mode="r")[start : start + shard["samples"]]
    try:
        with tarfile.open(folder / name) as tar:
            members = tar.getmembers()
            if len(members) != 2 * len(rows):
                return [*faults, f"{name}: {len(members)} members, the index says {2 * len(rows)}"]
            lines = [f"v1.2 {len(rows)}"]
            for row, image, about in zip(rows, members[::2], members[1::2], strict=True):
                faults += [
                    f"{name} key {int(row['key']):09d}: {f}"
                    for f in _check_sample(tar, row, image, about, spaces)
                ]
                lines.append(
                    " ".join(
                        f"{m.name.rpartition('.')[2]} {m.offset_data} {m.size} {m.name}"
                        for m in (image, about)
                    )
                )
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        return [*faults, f"{name}: not a readable tar ({error})"]
    if (folder / idx_name).is_file() and (folder / idx_name).read_text() != "\n".join(lines) + "\n":
        faults.append(f"{idx_name}: does not describe the tar")
    return faults


def _check_sample(
    tar: tarfile.TarFile, row: Any, image: tarfile.TarInfo, about: tarfile.TarInfo, spaces: dict[str, Any]
) -> Iterator[str]:
    key = f"{int(row['key']):09d}"
    plain = all(m.isreg() and not m.issparse() for m in (image, about))
    stem, _, extension = image.name.rpartition(".")
    if not plain or stem != key or not extension.isalnum() or about.name != f"{key}.json":
        yield f"members are {image.name} and {about.name}"
        return
    if (image.offset_data, image.size) != (int(row["offset"]), int(row["size"])):
        yield "the index points elsewhere"
    data, text = tar.extractfile(image), tar.extractfile(about)
    assert data is not None and text is not None
    try:
        record = json.loads(text.read())
        generator = spaces["generators"][int(row["generator"])]
        label = int(row["object"])
        allowed = [None] if label < 0 else [label, spaces["objects"][label]]
        if record["generator"] != generator or record["object"] not in allowed:
            yield f"labels are {record['generator']}, {record['object']} in the tar, {generator}, {label} in the index"
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        yield f"{about.name} is not a sample's record ({error})"
    try:
        encoded = data.read()
        limit = spaces["codec"].get("max_megapixels", MEGAPIXELS)
        decoded = open_image(encoded, max_megapixels=limit)
        if decoded.size != (int(row["width"]), int(row["height"])):
            yield f"is {decoded.size[0]}x{decoded.size[1]}, the index says {row['width']}x{row['height']}"
        if fault := training_fault(encoded, decoded, spaces["codec"].get("transparency", "drop")):
            yield fault
    except Undecodable as error:
        yield f"not decodable ({error})"
