"""Copies of shards in a local folder, shared by all processes of the machine.

A copy is named after its SHA-256, so that runs share equal shards. It is written under a
temporary name, hashed on the way, synced and renamed: a file of that name is always complete. Locks
(flock) are held on the files themselves and end with their process, however it ends:

* who copies holds the temporary file alone, and others turn to another shard meanwhile;
* who reads holds the copy together with others, so that nobody evicts it.

A thread copies the shards that are read next. Until a copy is complete, reads go to the shards'
own folder, so training never waits for a copy, and its result does not depend on the cache.
"""

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataio.core.atomic import sync_folder
from dataio.core.errors import UserError
from dataio.core.locks import locked
from dataio.core.log import log
from dataio.sources.remote_path import PATIENCE, AnyPath, RemotePath

_CHUNK = 4 << 20  # bytes copied at a time
UNPLANNED = 32  # shards held beyond the plan, for orders that announce none
_PAUSE = 0.05  # seconds between looks at what another process copies
_PAUSE_FULL = 1.0  # and between looks whether there is room again
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class CacheOptions:
    """Where a `ShardSet` keeps copies of its shards.

    Attributes:
        folder: of the copies; shared by the machine's processes and runs.
        cap_gib: the most that all copies may take, GiB; 0 sets no limit.
        strict: read nothing from a tar whose SHA-256 proves wrong while it is copied.
        patience: seconds without an answer after which shards behind a URL are given up.
    """

    folder: str | Path
    cap_gib: float = 0.0
    strict: bool = True
    patience: float = PATIENCE


class ShardCache:
    """The copies of one split's shards.

    Args:
        folder: of the copies; made where it is missing. source: the shards' folder or URL.
        shards: of the manifest. cap_gib: what all copies may take, GiB; 0 sets no limit.

    Attributes:
        faulty: shards whose bytes in `source` are not those of the manifest, as far as copied.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, source: AnyPath, shards: Sequence[dict[str, Any]], cap_gib: float
    ) -> None:
        self.folder, self._source, self._shards = Path(folder), source, shards
        self._cap = int(cap_gib * 2**30)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "a"):
                pass
        except OSError as error:
            raise UserError(
                f"data.cache_dir {folder}: cannot be written ({error.strerror}); choose another, or none"
            ) from None
        self._held: dict[int, int] = {}  # descriptors under a shared lock, by shard
        self._planned: list[int] = []
        self._extra: list[int] = []  # asked for and not planned, newest last
        self._given_up: set[int] = set()
        self.faulty: set[int] = set()
        self._checked: set[tuple[int, int]] = (
            set()
        )  # device and inode of copies whose digest was seen to hold
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()

    # ---- the reader's side: one thread -------------------------------------------------

    def plan(self, shards: Sequence[int]) -> None:
        """Say which shards are read next, in order; copies of others may be evicted from now on."""
        with self._changed:
            self._planned, self._extra = list(dict.fromkeys(shards)), []
            self._release(set(self._held) - set(self._planned))
            self._wake()

    def descriptor(self, shard: int) -> int | None:
        """An open copy that stays readable until the next `plan`; None where there is none yet."""
        with self._changed:
            if shard not in self._planned:
                if shard in self._extra:
                    self._extra.remove(shard)
                self._extra.append(shard)
                if len(self._extra) > UNPLANNED:
                    self._release({self._extra.pop(0)})
            if shard not in self._held:
                self._wake()
                return None
            return self._held[shard]

    def distrust(self, shard: int, reason: str) -> None:
        """Remove a copy that failed its reader; it is made again."""
        with self._changed:
            self._release({shard})
            self._remove(self._path(shard), f"{reason}; it is copied again")
            self._wake()

    def wait(self, seconds: float) -> bool:
        """Wait until all that was planned is there, or given up; whether it is (for tests and measurements)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._missing(), seconds)

    def _release(self, shards: set[int]) -> None:
        for shard in shards & set(self._held):
            descriptor = self._held.pop(shard)
            _touch(descriptor)
            os.close(descriptor)

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shard-cache", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # ---- the copying thread ------------------------------------------------------------

    def _missing(self) -> list[int]:
        queue = [*self._planned, *reversed(self._extra)]
        return [s for s in queue if s not in self._held and s not in self._given_up]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._missing)
                missing = self._missing()
            pause = _PAUSE
            for shard in missing:
                try:
                    if self._hold(shard) or (self._copy(shard) and self._hold(shard)):
                        pause = 0.0
                        break
                except BlockingIOError:
                    continue  # another process copies it: the next one
                except OSError as error:
                    if error.errno in _FULL:
                        pause = self._when_full(shard, error)
                        break
                    self._when_failed(shard, error)
            time.sleep(pause)
            with self._changed:
                self._changed.notify_all()

    def _when_full(self, shard: int, error: OSError) -> float:
        """There is no room for a copy; returns the seconds until the next try."""
        self._say("is full: shards that have no copy are read from their own folder")
        return _PAUSE_FULL

    def _when_failed(self, shard: int, error: OSError) -> None:
        """The source cannot be read, or is not the manifest's: the reader's to report."""
        self._given_up.add(shard)
        self._say(f"{self._shards[shard]['file']} is not copied ({error.strerror or error})")

    def _hold(self, shard: int) -> bool:
        """Open a copy and lock it against eviction, if it is there and whole."""
        path = self._path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if not path.exists() or not os.path.samestat(os.stat(path), status):
                raise BlockingIOError  # evicted in between
            mark = (status.st_dev, status.st_ino)
            if mark not in self._checked:
                if self._digest(descriptor) != self._shards[shard]["sha256"]:
                    self._remove(path, "its SHA-256 is not the manifest's; it is copied again")
                    raise BlockingIOError
                self._checked.add(mark)
            _touch(descriptor)
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            self._remove(path, f"{error.strerror}; it is copied again")
            return False
        with self._changed:
            if shard in self._planned or shard in self._extra:
                self._held[shard] = descriptor
            else:  # no longer wanted
                os.close(descriptor)
        return True

    def _copy(self, shard: int) -> bool:
        """Copy one shard, unless that was done meanwhile.

        Raises:
            BlockingIOError: another process is copying it. OSError: it cannot be copied, with
                ENOSPC where the disk is full.
        """
        entry, path = self._shards[shard], self._path(shard)
        temporary = self.folder / f".{path.name}.tmp"
        with locked(temporary):
            try:
                if path.exists():
                    return True
                with open(temporary, "rb+") as file:
                    file.truncate(0)
                    self._make_room(file.fileno(), entry["bytes"], temporary)
                    digest = hashlib.sha256()
                    for chunk in _content(self._source / entry["file"], entry["bytes"]):
                        digest.update(chunk)
                        file.write(chunk)
                    if file.tell() != entry["bytes"] or digest.hexdigest() != entry["sha256"]:
                        self.faulty.add(shard)
                        raise OSError("its SHA-256 is not the manifest's")
                    file.flush()
                    os.fsync(file.fileno())
                    status = os.fstat(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                if path.exists():
                    temporary.unlink(missing_ok=True)
        sync_folder(self.folder)
        self._checked.add((status.st_dev, status.st_ino))
        return True

    def _make_room(self, descriptor: int, size: int, target: Path) -> None:
        """Take `size` bytes of the disk for a file, evicting what was not used for the longest time.

        Raises:
            OSError: ENOSPC, there are not so many.
        """
        with self._alone():
            files = []
            for path in self.folder.iterdir():
                if path == target or path.suffix not in (".tar", ".tmp"):
                    continue
                if path.suffix == ".tmp" and _evict(path):  # its process was killed
                    continue
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
            taken = sum(length for _, length, _ in files)
            oldest = sorted(entry for entry in files if entry[2].suffix == ".tar")
            if self._cap and size > self._cap:
                raise OSError(errno.ENOSPC, "larger than data.cache_gib")
            while not self._fits(descriptor, size, taken):
                while oldest:
                    _, length, path = oldest.pop(0)
                    if _evict(path):
                        taken -= length
                        break
                else:
                    raise OSError(errno.ENOSPC, "every copy is in use")

    def _fits(self, descriptor: int, size: int, taken: int) -> bool:
        if self._cap and taken + size > self._cap:
            return False
        try:
            os.posix_fallocate(descriptor, 0, max(1, size))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return False
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Count and evict as the only process of this folder."""
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(locked(self.folder / ".lock"))
                    break
                except BlockingIOError:
                    time.sleep(_PAUSE / 5)
            yield

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self._shards[shard]['sha256']}.tar"

    def _digest(self, descriptor: int) -> str:
        digest, offset = hashlib.sha256(), 0
        while chunk := os.pread(descriptor, _CHUNK, offset):
            digest.update(chunk)
            offset += len(chunk)
        return digest.hexdigest()

    def _remove(self, path: Path, reason: str) -> None:
        path.unlink(missing_ok=True)
        self._say(f"{path.name} is removed ({reason})")

    def _say(self, text: str) -> None:
        if text not in self._said and os.environ.get("LOCAL_RANK", "0") == "0":
            log.warning(f"data.cache_dir {self.folder}: {text}")
        self._said.add(text)


def _content(path: AnyPath, size: int) -> Iterator[bytes]:
    """A file in pieces; `size` is what the manifest says."""
    if isinstance(path, RemotePath):
        yield from path.parts(size)
        return
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK):
            yield chunk


def _touch(descriptor: int) -> None:
    """Note that a copy is in use now; what was not for the longest time is evicted first."""
    with suppress(PermissionError):  # another user's
        os.utime(descriptor)


def _evict(path: Path) -> bool:
    """Remove a file that nobody holds; whether it was."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
