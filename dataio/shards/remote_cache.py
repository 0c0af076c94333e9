"""Shards behind a URL: nothing but copies in a local folder is read.

Tars are copied as those of a slow folder are (`ShardCache`), and a reader waits for what is not
there yet. Small files (indexes, tables) are copied as wholes when a split is opened, named after
their SHA-256 too; they are not evicted.
"""

import functools
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from dataio.core.errors import UserError, reason_of, writing
from dataio.core.locks import locked
from dataio.core.log import log
from dataio.shards.local_cache import UNPLANNED, ShardCache
from dataio.sources.remote_path import AnyPath, RemotePath, Unanswered

CACHE_VARIABLE = "TELLTALE_CACHE"
_SHARE = 0.8  # of the free disk that a cache takes that nobody chose
_AHEAD = 2  # shards copied ahead of a reader that goes through them in order
_PATIENT = 30.0  # seconds until it is said what a reader waits for
_PAUSE_FULL = 1.0  # seconds between looks whether there is room again


class RemoteShardCache(ShardCache):
    """The copies of one split's shards, which can only be read there; see `ShardCache`.

    Args:
        source: the shards' folder.
    """

    _urgent: int | None = None  # the shard that the reader waits for

    def __init__(self, folder: str | Path, source: RemotePath, shards: Any, cap_gib: float) -> None:
        super().__init__(folder, source, shards, cap_gib)
        self._url, self._errors = source, dict[int, OSError]()
        self._full_since: float | None = None

    def descriptor(self, shard: int) -> int | None:
        """An open copy, waiting for it; None where the shard's bytes are not the manifest's.

        Raises:
            UserError: it cannot be had.
        """
        with self._changed:
            held = super().descriptor(shard)
            if held is not None or shard in self.faulty:
                return held
            self._look_ahead(shard)
            self._given_up.discard(shard)
            self._errors.pop(shard, None)
            self._urgent, self._full_since = shard, None
            try:
                self._wake()
                return self._await(shard)
            finally:
                self._urgent = None

    def _await(self, shard: int) -> int | None:
        began, said, file = time.monotonic(), False, self._url / self._shards[shard]["file"]
        while shard not in self._held:
            if shard in self.faulty:
                return None
            if shard in self._errors:
                raise unreadable(file, self._errors[shard])
            assert self._thread is not None
            if not self._thread.is_alive():
                raise RuntimeError("the thread that copies shards has ended")
            self._changed.wait(1.0)
            if not said and time.monotonic() - began > _PATIENT:
                said = True
                log.info(f"waiting for {file}")
        return self._held[shard]

    def _look_ahead(self, shard: int) -> None:
        """Orders that announce nothing are mostly those that go through all shards."""
        if shard in self._planned:
            return
        following = range(shard + 1, min(shard + 1 + _AHEAD, len(self._shards)))
        ahead = [s for s in reversed(following) if s not in self._extra and s not in self._held]
        self._extra[-1:] = [*ahead, shard]  # what was asked for last is copied first
        while len(self._extra) > UNPLANNED:
            self._release({self._extra.pop(0)})

    def _missing(self) -> list[int]:
        missing = super()._missing()
        if self._urgent in missing:
            missing.remove(self._urgent)
            missing.insert(0, self._urgent)
        return missing

    def _when_full(self, shard: int, error: OSError) -> float:
        with self._changed:
            if self._urgent != shard:
                return _PAUSE_FULL  # it is copied when room is made, or needed
            size = self._shards[shard]["bytes"]
            if self._cap and size > self._cap:
                self._errors[shard] = error
                return 0.0
            others = set(self._held) - {shard}
            if others:
                self._release(others)  # so that they can be evicted
                window = sum(self._shards[s]["bytes"] for s in {*self._planned, shard})
                self._say(
                    "is full: shards are copied again and again; what is read now and next "
                    f"takes {window / 2**30:.3g} GiB, so give it more (data.cache_gib, a larger disk)"
                )
                return 0.0
            now = time.monotonic()
            self._full_since = self._full_since or now
            if now - self._full_since > self._url.patience:
                self._errors[shard] = error
            return _PAUSE_FULL

    def _when_failed(self, shard: int, error: OSError) -> None:
        with self._changed:
            super()._when_failed(shard, error)
            self._errors[shard] = error
            if self._urgent is not None and isinstance(error, Unanswered):
                self._errors[self._urgent] = error  # the same server, which was waited for just now


def unreadable(file: RemotePath, error: OSError) -> UserError:
    """The error of a remote file, in one line that names its URL."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{file}: missing, but the manifest lists it; upload it again or re-shard")
    if isinstance(error, Unanswered):
        hint = "check the network and the server; a run continues from its last checkpoint when started again"
    elif isinstance(error, PermissionError):
        hint = "check the credentials and the address"
    else:
        hint = "fix that, or upload it again"
    return UserError(f"{file}: cannot be read ({reason_of(error)}); {hint}")


def default_cache() -> Path:
    """Where copies are kept if nobody chose a folder: $TELLTALE_CACHE, or one of the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(chosen) if chosen else base / "telltale" / "shards"


@functools.cache
def default_cap(folder: Path) -> float:
    """The most that a cache may take which nobody chose, GiB: most of what the disk has now; it is said once."""
    with writing(folder, hint=f"choose another by data.cache_dir or {CACHE_VARIABLE}"):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("*.tar"))
    cap = _SHARE * free / 2**30
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.info(
            f"copies of remote shards are kept in {folder}, at most {cap:.3g} GiB (data.cache_dir or "
            f"{CACHE_VARIABLE} chooses another folder)"
        )
    return cap


def small_file(place: AnyPath, size: int, sha256: str, cache: str | Path | None = None) -> Path:
    """A small file of a shard folder on a local disk: itself, or for a URL its copy, which is made once.

    Args:
        size: bytes. cache: the folder of the copies; None for the default.

    Raises:
        UserError: it cannot be had, or is not what `size` and `sha256` say.
    """
    if not isinstance(place, RemotePath):
        return place
    folder = Path(cache) if cache else default_cache()
    path = folder / f"{sha256}{place.suffix}"
    with writing(folder, hint=f"choose another by data.cache_dir or {CACHE_VARIABLE}"):
        folder.mkdir(parents=True, exist_ok=True)
    if _has(path, size):
        return path
    temporary = folder / f".{path.name}.tmp"
    with locked(temporary, wait=f"another process copies {place}"):
        try:
            if not _has(path, size):
                _copy_small(place, size, sha256, temporary)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _copy_small(place: RemotePath, size: int, sha256: str, temporary: Path) -> None:
    digest = hashlib.sha256()
    with open(temporary, "rb+") as file:
        file.truncate(0)
        parts = place.parts(size)
        while True:
            try:
                part = next(parts, None)
            except OSError as error:
                raise unreadable(place, error) from None
            if part is None:
                break
            digest.update(part)
            with writing(temporary.parent, hint="make room, or choose another by data.cache_dir"):
                file.write(part)
        with writing(temporary.parent, hint="make room, or choose another by data.cache_dir"):
            file.flush()
            os.fsync(file.fileno())
        if file.tell() != size or digest.hexdigest() != sha256:
            raise UserError(
                f"{place}: its SHA-256 is not the manifest's: changed; upload it again or re-shard"
            )


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
