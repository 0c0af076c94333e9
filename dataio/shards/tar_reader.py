"""Reading samples' bytes out of a set of tars: the place where a failing disk shows.

Tars are read with pread, not mapped: when a disk fails or a file is truncated, a mapping kills the
process with SIGBUS, while a read raises an error that names the file.
"""

import errno
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.shards.local_cache import ShardCache
from dataio.shards.shard_table import shard_counts
from dataio.sources.remote_path import AnyPath, RemotePath

TAR_BLOCK = 512  # of a tar
_OPEN_TARS = 256  # at a time; the order touches only a window of shards
# Errors that pass on network file systems: a glitch, a restarted server, a stale handle.
TRANSIENT_ERRNOS = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT)
_PAUSES = (0.1, 0.5, 2.0)  # seconds before each further try
_WHOLE = 64 << 20  # bytes of tars kept in memory
_FITTING = 8  # at least so many must fit
_PART = 8  # a tar is read as a whole once one part in so many was read in single samples
_COUNTED = 4096  # tars whose single reads are counted
_IDLE = 4096  # samples; a tar that gave none of them makes room

Read = TypeVar("Read")


class Unreadable(Exception):
    """Bytes cannot be read, or differ from those written; the message is the reason."""


class DamagedSample(UserError):
    """A sample whose bytes cannot be read, or differ from those written.

    Attributes:
        reason: what is wrong, without the location. source: the path it was made from, "" if unknown.
    """

    def __init__(self, message: str, reason: str, source: str = "") -> None:
        super().__init__(message)
        self.reason, self.source = reason, source


def retry_transient(read: Callable[[], Read], again: Callable[[], None]) -> Read:
    """The result of `read`; after a transient error, call `again` and retry.

    Raises:
        OSError: the error is not transient, or all retries failed.
    """
    pauses = list(_PAUSES)
    while True:
        try:
            return read()
        except OSError as error:
            if not pauses or error.errno not in TRANSIENT_ERRNOS:
                raise
        time.sleep(pauses.pop(0))
        again()


def check_shard_file(path: Path, size: int) -> None:
    """Raise a UserError where a file of the manifest is missing or has another size, in bytes."""
    try:
        actual = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing, but the manifest lists it; copy it again or re-shard") from None
    if actual != size:
        raise UserError(
            f"{path}: {actual} bytes, the manifest says {size}: truncated or changed; copy it again or re-shard"
        )


def safe_members(archive: tarfile.TarFile, name: str | Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of a foreign tar; folders are passed over.

    Raises:
        UserError: a member is a link, a device or the like, or its name leads out of the
            tar: no tool for data sets writes such members, so the whole tar is refused.
    """
    for member in archive:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            trouble = "has a name that leads out of the tar"
        elif not (member.isreg() or member.isdir()) or member.issparse():
            trouble = "is neither a plain file nor a folder"
        else:
            if member.isreg():
                yield member
            continue
        raise UserError(f"{name}: member {member.name!r} {trouble}; unsafe tar, make it again")


@dataclass(slots=True)
class _Whole:
    """A small tar in memory: its bytes, an array over them, and how many were given out, up to when."""

    data: bytes
    array: NDArray[np.uint8]
    given: int
    used: int


class TarReader:
    """The tars of a split, read by number and offset; for any thread, one at a time.

    A small tar of which many samples are read one by one is read as a whole and kept: thousands of
    reads of a kilobyte each are mostly system calls. Which bytes are had does not depend on it.

    Args:
        folder: the names in `shards` start here; of a remote one only the cache's copies are read.
        shards: of the manifest.
        cache: copies that are nearer, used where there are some.
        strict: read nothing of a tar that the cache found to have another SHA-256.
        check: look at the sizes of a tar and its index when it is first opened, since nobody has before.

    Raises:
        UserError: (when a tar is first opened, with `check`) it is missing or has another size.
    """

    def __init__(
        self,
        folder: AnyPath,
        shards: Sequence[dict[str, Any]],
        cache: ShardCache | None = None,
        *,
        strict: bool = True,
        check: bool = False,
    ) -> None:
        self.folder, self.shards, self.cache, self._strict = folder, shards, cache, strict
        self._bytes = shard_counts(shards, "bytes")
        self._unchecked = bytearray(b"\1" * len(shards)) if check else bytearray()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._whole: OrderedDict[int, _Whole] = OrderedDict()
        self._singly: dict[int, int] = {}  # bytes read one by one, by shard
        self._views = 0
        self._lock = threading.RLock()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def member(self, shard: int, key: int, offset: int, size: int) -> bytes:
        """The content of a tar member whose header names the key and the size.

        Args:
            offset, size: of the content, bytes.

        Raises:
            Unreadable: it cannot be read, or another member lies there.
        """

        def check(data: bytes) -> bytes:
            if _is_member(data, key, size):
                return data[TAR_BLOCK:]
            raise Unreadable("the tar holds something else there")

        return self._nearest(shard, offset - TAR_BLOCK, TAR_BLOCK + size, check)

    def view(self, shard: int, key: int, offset: int, size: int) -> NDArray[np.uint8]:
        """As `member`, uint8 [size], out of a tar in memory where that pays."""
        with self._lock:
            return self._view(shard, key, offset, size)

    def _view(self, shard: int, key: int, offset: int, size: int) -> NDArray[np.uint8]:
        self._views += 1
        whole = self._whole.get(shard)
        if whole is not None:
            begin = offset - TAR_BLOCK
            known_bad = self._strict and self.cache is not None and shard in self.cache.faulty
            if (
                begin >= 0
                and offset + size <= len(whole.data)
                and not known_bad
                and _is_member(whole.data[begin:offset], key, size)
            ):
                whole.given += size
                whole.used = self._views
                return whole.array[offset : offset + size]
            del self._whole[shard]  # whatever it is, the usual way says so
        data = np.frombuffer(self.member(shard, key, offset, size), np.uint8)
        read = self._singly.get(shard, 0) + TAR_BLOCK + size
        if len(self._singly) > _COUNTED:
            self._singly.clear()  # a million shards are not worth their memory
        self._singly[shard] = read
        if read * _PART > self._bytes[shard]:
            self._keep_whole(shard)
        return data

    def _keep_whole(self, shard: int) -> None:
        """Read a small tar as a whole, if there is room for it."""
        self._singly[shard] = 0
        size = int(self._bytes[shard])
        if size * _FITTING > _WHOLE:
            return
        room = _WHOLE - size - sum(len(whole.data) for whole in self._whole.values())
        for other, whole in list(self._whole.items()):
            if room >= 0:
                break
            if whole.given * 2 > len(whole.data) or self._views - whole.used > _IDLE:
                room += len(self._whole.pop(other).data)
        if room < 0:
            return  # the others are in use, and would be read again
        try:
            data = self._nearest(shard, 0, size, lambda data: data)
        except Unreadable:
            return  # a bad place of it must not take the other samples along
        self._whole[shard] = _Whole(data, np.frombuffer(data, np.uint8), 0, self._views)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes offset..offset+size-1 of a tar.

        Raises:
            Unreadable: they cannot be read.
        """
        return self._nearest(shard, offset, size, lambda data: data)

    def _nearest(self, shard: int, offset: int, size: int, check: Callable[[bytes], bytes]) -> bytes:
        with self._lock:  # a descriptor must not be closed while it is read
            return self._nearest_copy(shard, offset, size, check)

    def _nearest_copy(self, shard: int, offset: int, size: int, check: Callable[[bytes], bytes]) -> bytes:
        if shard >= len(self._bytes):
            raise Unreadable(f"the index names shard {shard} of {len(self._bytes)}")
        if offset < 0 or offset + size > self._bytes[shard]:
            raise Unreadable(f"the index points beyond its {self._bytes[shard]} bytes")
        if self.cache is not None:
            remote = isinstance(self.folder, RemotePath)
            for _ in range(2 if remote else 1):  # a copy that failed is made again
                copy = self.cache.descriptor(shard)
                if copy is None:
                    break
                try:
                    return check(_read_all(copy, offset, size))
                except (OSError, Unreadable) as error:
                    self.cache.distrust(shard, str(error))
            if self._strict and shard in self.cache.faulty:
                raise Unreadable("the tar's SHA-256 is not the manifest's")
        return check(self._from_source(shard, offset, size))

    def _from_source(self, shard: int, offset: int, size: int) -> bytes:
        if isinstance(self.folder, RemotePath):  # damaged there: its good samples are read one by one
            try:
                return (self.folder / self.shards[shard]["file"]).read_range(offset, size)
            except OSError as error:
                raise Unreadable(f"cannot be read ({error.strerror or error})") from None
        try:
            return retry_transient(
                lambda: _read_all(self._descriptor(shard), offset, size), lambda: self._close(shard)
            )
        except OSError as error:
            self._close(shard)
            raise Unreadable(f"cannot be read ({error.strerror or error})") from None

    def _close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))  # a stale handle never recovers

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        assert isinstance(self.folder, Path)
        path, size = self.folder / self.shards[shard]["file"], int(self._bytes[shard])
        if self._unchecked and self._unchecked[shard]:
            check_shard_file(path, size)
            check_shard_file(path.with_suffix(".idx"), self.shards[shard]["idx_bytes"])
            self._unchecked[shard] = 0
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        actual = os.fstat(descriptor).st_size
        if actual != size:
            os.close(descriptor)
            raise Unreadable(f"the tar is {actual} bytes, the manifest says {size}")
        self._open[shard] = descriptor
        if len(self._open) > _OPEN_TARS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _is_member(header: bytes, key: int, size: int) -> bool:
    return header.startswith(b"%09d." % key) and header[124:135] == b"%011o" % size


def _read_all(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a signal may cut a read short
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise Unreadable(f"the tar ends at byte {offset + len(data)}")
        data += more
    return data
