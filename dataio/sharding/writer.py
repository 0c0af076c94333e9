"""Writing one shard: a plain WebDataset tar, DALI's index beside it, and its sidecar."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataio.core.atomic import write_text, write_with
from dataio.core.errors import UserError, one_line
from dataio.images.codec import CodecPolicy, Encoded, encode, open_source
from dataio.images.opening import Undecodable, quiet_pillow, to_rgb
from dataio.sharding.duplicates import FINGERPRINT, image_fingerprint
from dataio.sharding.plan import ShardPlan, ShardSpec, read_task
from dataio.shards.manifest import IDENTITY, SAMPLE
from dataio.shards.tar_reader import TAR_BLOCK
from dataio.sources.source import Source

WORK = ".work"
PRINTS = ".prints.npy"  # suffix of the fingerprints, which are compared at the end
IDENTITIES = ".identities.npy"  # suffix of the sources' identities


class _HashingFile:
    """A file that is only appended to, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644  # times and owners stay zero
    return info


def member_json(
    generator: str, label: int | None, objects: Sequence[str], style: str, path: str, subset: str
) -> bytes:
    """The `<key>.json` of a sample: compact, keys sorted."""
    value = label if label is None or style == "index" else objects[label]
    record: dict[str, Any] = {"generator": generator, "object": value, "source": path}
    if subset:
        record["subset"] = subset
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def sidecar_path(output: Path, task: ShardSpec, suffix: str) -> Path:
    return output / WORK / f"{task.split}-{task.number:06d}{suffix}"


def read_sidecar(output: Path, task: ShardSpec) -> dict[str, Any] | None:
    """The record of a committed shard; None where it is yet to be written."""
    try:
        done = json.loads(sidecar_path(output, task, ".json").read_text())
        size = (output / f"{task.name}.tar").stat().st_size
    except (OSError, ValueError):
        return None
    return done if size == done["bytes"] else None


def write_shard(output: Path, plan: ShardPlan, task: ShardSpec, source: Source, label: str = "") -> None:
    """Write one shard, its index and its sidecar, unless they exist.

    Args:
        label: of the temporary files, so that a cleanup spares those of other tasks.

    Raises:
        OSError: it cannot be written; then nothing of it is left.
    """
    if read_sidecar(output, task) is not None:  # another task was faster
        return
    try:
        with quiet_pillow():
            _write_shard(output, plan, task, source, label)
    except OSError:
        # On a full disk, whole shards only.
        for path in (output / f"{task.name}.tar", output / f"{task.name}.idx"):
            path.unlink(missing_ok=True)
        raise


def _write_shard(output: Path, plan: ShardPlan, task: ShardSpec, source: Source, label: str) -> None:
    generators = {name: number for number, name in enumerate(plan.generators)}
    subsets = {name: number for number, name in enumerate(plan.subsets)}
    rows: list[tuple[int, ...]] = []
    prints: list[tuple[Any, ...]] = []
    identities: list[bytes] = []
    index: list[str] = []
    rejected: list[list[str]] = []
    warned: list[list[str]] = []
    tar_path = output / f"{task.name}.tar"
    hashed: list[_HashingFile] = []

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as raw:
            file = _HashingFile(raw)
            hashed.append(file)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                lines = read_task(output / WORK, task)
                for key, (path, generator, label, subset) in enumerate(lines, task.first_key):
                    try:
                        made, looks, identity = encode_source(source, path, plan.policy)
                    except Undecodable as error:
                        rejected.append([path, str(error)])
                        continue
                    if made.warning:
                        warned.append([path, made.warning])
                    about = member_json(generator, label, plan.objects, plan.object_in_json, path, subset)
                    parts = []
                    offset = 0
                    for extension, data in ((made.extension, made.data), ("json", about)):
                        name = f"{key:09d}.{extension}"
                        start = tar.offset + TAR_BLOCK
                        offset = offset or start
                        parts.append(f"{extension} {start} {len(data)} {name}")
                        tar.addfile(_member(name, len(data)), io.BytesIO(data))
                    index.append(" ".join(parts))
                    known = -1 if label is None else label
                    where = (task.number, offset, len(made.data), made.width, made.height)
                    rows.append((*where, generators[generator], subsets[subset], known, key))
                    prints.append((key, *looks))
                    identities.append(identity)

    write_with(tar_path, write, label)
    idx = f"v1.2 {len(index)}\n" + "".join(f"{line}\n" for line in index)
    write_text(tar_path.with_suffix(".idx"), idx, label)
    tables = {
        ".npy": np.array(rows, SAMPLE),
        PRINTS: np.array(prints, FINGERPRINT),
        IDENTITIES: np.frombuffer(b"".join(identities), IDENTITY),
    }
    for suffix, table in tables.items():
        write_with(sidecar_path(output, task, suffix), partial(save_array, array=table), label)
    done = {
        "samples": len(rows),
        "bytes": hashed[0].size,
        "sha256": hashed[0].sha256,
        "idx_bytes": len(idx.encode()),
        "idx_sha256": hashlib.sha256(idx.encode()).hexdigest(),
        "rejected": rejected,
        "warnings": warned,
    }
    write_text(sidecar_path(output, task, ".json"), json.dumps(done), label)


def save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def encode_source(
    source: Source, path: str, policy: CodecPolicy
) -> tuple[Encoded, tuple[tuple[int, int], int, bool], bytes]:
    """One source under the policy, its `image_fingerprint`, and the identity of its file.

    Raises:
        Undecodable: it cannot be read or decoded.
    """
    try:
        data, identity = source.read_original(path)
    except (UserError, Undecodable):  # a view may leave an image out
        raise
    except Exception as error:  # of the disk, or of a zip's damaged member
        raise Undecodable(f"cannot be read ({one_line(error)})") from None
    image = open_source(data, policy)
    return encode(data, policy, image), image_fingerprint(to_rgb(image)), identity
