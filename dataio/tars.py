"""Reading samples' bytes out of a set of tars: the one place where a disk can fail a run.

Tars are read with pread and not mapped: a mapped file whose disk fails, or that somebody
truncates, ends the process by a signal; a read says which file and why.
"""

import errno
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dataio.cache import ShardCache
from dataio.errors import UserError

BLOCK = 512  # of a tar
_OPEN_TARS = 256  # at a time; the order touches only a window of shards
# What passes on network file systems: a glitch, a server that restarted, a handle gone stale.
_PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT)
_PAUSES = (0.1, 0.5, 2.0)  # seconds before each further try


class Unreadable(Exception):
    """Bytes cannot be had, or are not what was written; the message is the reason."""


class DamagedSample(UserError):
    """A sample whose bytes cannot be had, or are not those that were written.

    Attributes:
        reason: what is wrong with it, without its place. source: the path it was made from, "" if unknown.
    """

    def __init__(self, message: str, reason: str, source: str = "") -> None:
        super().__init__(message)
        self.reason, self.source = reason, source


def safe_members(archive: tarfile.TarFile, name: str | Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of a foreign tar; folders are passed over.

    Raises:
        UserError: a member is a link, a device or the like, or its name leads out of the
            tar: nothing that makes data sets writes such, so the whole tar is refused.
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
        raise UserError(f"{name}: member {member.name!r} {trouble}; this is no safe tar, make it anew")


class Tars:
    """The tars of a split, read by number and offset; for one thread.

    Args:
        folder: the names in `shards` start here. shards: of the manifest.
        cache: copies that are nearer, used where there are some.
        strict: read nothing of a tar that the cache found to have another SHA-256.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[dict[str, Any]],
        cache: ShardCache | None = None,
        *,
        strict: bool = True,
    ) -> None:
        self.folder, self.shards, self.cache, self._strict = folder, shards, cache, strict
        self._open: OrderedDict[int, int] = OrderedDict()

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
            if data[:BLOCK].startswith(b"%09d." % key) and data[124:135] == b"%011o" % size:
                return data[BLOCK:]
            raise Unreadable("the tar holds something else there")

        return self._nearest(shard, offset - BLOCK, BLOCK + size, check)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes offset..offset+size-1 of a tar.

        Raises:
            Unreadable: they cannot be read.
        """
        return self._nearest(shard, offset, size, lambda data: data)

    def _nearest(self, shard: int, offset: int, size: int, check: Callable[[bytes], bytes]) -> bytes:
        if shard >= len(self.shards):
            raise Unreadable(f"the index names shard {shard} of {len(self.shards)}")
        if offset < 0 or offset + size > self.shards[shard]["bytes"]:
            raise Unreadable(f"the index points beyond its {self.shards[shard]['bytes']} bytes")
        if self.cache is not None:
            copy = self.cache.descriptor(shard)
            if copy is not None:
                try:
                    return check(_read_all(copy, offset, size))
                except (OSError, Unreadable) as error:
                    self.cache.distrust(shard, str(error))
            if self._strict and shard in self.cache.faulty:
                raise Unreadable("the tar's SHA-256 is not the manifest's")
        return check(self._from_source(shard, offset, size))

    def _from_source(self, shard: int, offset: int, size: int) -> bytes:
        for pause in (*_PAUSES, None):
            try:
                return _read_all(self._descriptor(shard), offset, size)
            except OSError as error:
                if shard in self._open:
                    os.close(self._open.pop(shard))  # a stale handle never recovers
                if pause is None or error.errno not in _PASSING:
                    raise Unreadable(f"cannot be read ({error.strerror or error})") from None
                time.sleep(pause)
        raise AssertionError("the last try either returns or raises")

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        descriptor = os.open(self.folder / self.shards[shard]["file"], os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(descriptor).st_size
        if found != self.shards[shard]["bytes"]:
            os.close(descriptor)
            raise Unreadable(f"the tar is {found} bytes, the manifest says {self.shards[shard]['bytes']}")
        self._open[shard] = descriptor
        if len(self._open) > _OPEN_TARS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _read_all(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a signal may cut a read short
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise Unreadable(f"the tar ends at byte {offset + len(data)}")
        data += more
    return data
