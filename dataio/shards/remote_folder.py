"""What is asked of a shard folder behind a URL when it is opened or checked."""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dataio.core.errors import UserError
from dataio.shards.local_cache import CacheOptions, ShardCache
from dataio.shards.remote_cache import RemoteShardCache, unreadable
from dataio.sources.remote_path import AnyPath, RemotePath


def open_cache(options: CacheOptions, folder: AnyPath, shards: Sequence[dict[str, Any]]) -> ShardCache:
    """The cache of a split's shards, local or remote.

    Raises:
        UserError: see `ShardCache`.
    """
    if isinstance(folder, RemotePath):
        return RemoteShardCache(options.folder, folder, shards, options.cap_gib)
    return ShardCache(options.folder, folder, shards, options.cap_gib)


def check_remote_files(
    folder: RemotePath, split: str, shards: Sequence[dict[str, Any]], verify: bool, tabled: bool
) -> None:
    """Compare the tars of a split with the manifest: their sizes, and with `verify` their SHA-256.

    Sizes come from a listing; there is none over http, and a set whose shards are in a table is
    not listed: each tar is checked when it is copied.

    Raises:
        UserError: a tar is missing or differs, or the server cannot be read.
    """
    if not tabled:
        try:
            sizes = (folder / split).sizes() if shards else None
        except OSError as error:
            raise unreadable(folder / split, error) from None
        for shard in [] if sizes is None else shards:
            assert sizes is not None
            size = sizes.get(PurePosixPath(shard["file"]).name)
            if size is None:
                raise UserError(
                    f"{folder / shard['file']}: missing, but the manifest lists it; upload it again or re-shard"
                )
            if size != shard["bytes"]:
                raise UserError(
                    f"{folder / shard['file']}: {size} bytes, the manifest says {shard['bytes']}: truncated or "
                    "changed; upload it again or re-shard"
                )
    for shard in shards if verify else ():
        if remote_sha256(folder / shard["file"], shard["bytes"]) != shard["sha256"]:
            raise UserError(
                f"{folder / shard['file']}: its SHA-256 is not the manifest's: changed; upload it again or re-shard"
            )


def remote_sha256(file: RemotePath, size: int) -> str:
    """The SHA-256 of a remote file of `size` bytes, in hexadecimal, without a copy.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for part in file.parts(size):
            digest.update(part)
    except OSError as error:
        raise unreadable(file, error) from None
    return digest.hexdigest()


def fetch(file: RemotePath, size: int, target: Path) -> None:
    """Copy a remote file of `size` bytes to `target`; none is there where the file is missing.

    Raises:
        UserError: it cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(target, "wb") as copy:
            for part in file.parts(size):
                copy.write(part)
    except FileNotFoundError:
        target.unlink()
    except OSError as error:
        raise unreadable(file, error) from None
