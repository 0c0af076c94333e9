"""The rows of a sample index, read on demand.

The index of ten billion samples has 400 GB. Rows are read in pages with pread, not mapped: a
truncated mapping kills the process with SIGBUS. Each page is validated on read, so that a wrong label
is reported and never reaches a loss.
"""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dataio.core.errors import UserError
from dataio.shards.tar_reader import retry_transient

_SHIFT = 10
PAGE = 1 << _SHIFT  # rows of a page
_SLOTS = 1024  # pages kept: 42 MB of rows
_CHUNK = 1 << 16  # rows read together where all are


class PagedIndex:
    """An index file as an array of rows, of which only pages are in memory; for any thread.

    `rows[ids]` gives rows, `rows["width"]` a whole column, and it can be iterated.

    Args:
        path: of the .npy file. dtype, count: of its rows. offset: bytes before the first one.
        fault: describes what is wrong with some rows; "" if nothing.

    Raises:
        UserError: (when rows are read) the file is shorter than it was, cannot be read, or
            `fault` finds something.
    """

    def __init__(
        self, path: Path, dtype: np.dtype[np.void], count: int, offset: int, fault: Callable[[Any], str]
    ) -> None:
        self.path, self.dtype, self._count, self._offset, self._fault = path, dtype, count, offset, fault
        self._descriptor = -1
        pages = -(-count // PAGE)
        self._slot_of = np.full(pages, -1, np.int16)
        self._page_in = np.full(min(pages, _SLOTS), -1, np.int64)
        self._pages = np.empty((len(self._page_in), PAGE), dtype)  # its memory is taken when it is filled
        self._hand = 0
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self._close()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, key: str) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, key: int | np.integer) -> Any: ...
    @overload
    def __getitem__(self, key: slice | NDArray[Any] | list[int]) -> NDArray[np.void]: ...
    def __getitem__(self, key: Any) -> Any:
        if type(key) is int and 0 <= key < self._count:  # the quick way for one
            with self._lock:
                slot = self._slot_of[key >> _SHIFT]
                if slot >= 0:
                    return self._pages[slot, key & (PAGE - 1)].copy()  # a page's memory is used again
        if isinstance(key, str):
            return np.concatenate(
                [part[key].copy() for part in self.chunks()] or [np.zeros(0, self.dtype[key])]
            )
        if isinstance(key, slice):
            start, stop, step = key.indices(self._count)
            if step == 1 and stop - start >= PAGE:
                part = np.empty(stop - start, self.dtype)
                self._read(start, part)
                return part
            key = np.arange(start, stop, step)
        ids = np.asarray(key)
        if ids.dtype == np.bool_:
            if ids.shape != (self._count,):
                raise IndexError(f"a mask of {ids.shape} for {self._count} rows")
            return self._masked(ids)
        if ids.size == 0:
            return np.empty(0, self.dtype)
        ids = ids.astype(np.int64, copy=False)
        # One comparison finds what is too large and what is below zero.
        if int(ids.view(np.uint64).max()) >= self._count:
            raise IndexError(f"rows {ids.min()} to {ids.max()} of {self._count}")
        if ids.ndim == 0:
            return self._gather(ids.reshape(1))[0]
        return self._gather(ids)

    def __iter__(self) -> Iterator[Any]:
        for part in self.chunks():
            yield from part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[np.arange(self._count)].astype(dtype or self.dtype, copy=False)

    def chunks(self) -> Iterator[NDArray[np.void]]:
        """All rows, some at a time."""
        for start in range(0, self._count, _CHUNK):
            part = np.empty(min(_CHUNK, self._count - start), self.dtype)
            self._read(start, part)
            yield part

    def _masked(self, mask: NDArray[np.bool_]) -> NDArray[np.void]:
        parts, start = [np.empty(0, self.dtype)], 0
        for part in self.chunks():
            parts.append(part[mask[start : start + len(part)]])
            start += len(part)
        return np.concatenate(parts)

    def _gather(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        pages = ids >> _SHIFT
        with self._lock:
            slots = self._slot_of[pages]
            if slots.min() < 0:
                needed = np.unique(pages)
                if len(needed) > len(self._page_in):
                    return self._gather_many(ids, pages, needed)
                self._load(needed)
                slots = self._slot_of[pages]
            return self._pages[slots, ids & (PAGE - 1)]

    def _gather_many(
        self, ids: NDArray[np.int64], pages: NDArray[np.int64], needed: NDArray[np.int64]
    ) -> NDArray[np.void]:
        """Rows of more pages than are kept."""
        rows = np.empty(ids.shape, self.dtype)
        for start in range(0, len(needed), len(self._page_in)):
            some = needed[start : start + len(self._page_in)]
            self._load(some)
            mask = (pages >= some[0]) & (pages <= some[-1])
            rows[mask] = self._pages[self._slot_of[pages[mask]], ids[mask] & (PAGE - 1)]
        return rows

    def _load(self, needed: NDArray[np.int64]) -> None:
        """Load all these pages into slots; the oldest others are evicted."""
        kept = set(needed.tolist())
        for page in needed[self._slot_of[needed] < 0].tolist():
            while (old := int(self._page_in[self._hand])) in kept:
                self._hand = (self._hand + 1) % len(self._page_in)
            slot, self._hand = self._hand, (self._hand + 1) % len(self._page_in)
            if old >= 0:
                self._slot_of[old], self._page_in[slot] = -1, -1
            start = page << _SHIFT
            self._read(start, self._pages[slot, : min(PAGE, self._count - start)])
            self._slot_of[page], self._page_in[slot] = slot, page

    def _read(self, start: int, into: NDArray[np.void]) -> None:
        begin = self._offset + start * self.dtype.itemsize
        buffer = memoryview(into.view(np.uint8).data)

        def read() -> int:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < len(buffer):  # a signal may cut a read short
                got = os.preadv(self._descriptor, [buffer[done:]], begin + done)
                if got == 0:
                    break
                done += got
            return done

        try:
            done = retry_transient(read, self._close)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror or error}); fix that, or copy it again"
            ) from None
        if done < len(buffer):
            size = os.fstat(self._descriptor).st_size
            raise UserError(f"{self.path}: {size} bytes, it had more: truncated; copy it again or re-shard")
        if fault := self._fault(into):
            raise UserError(f"{self.path}: {fault}; copy it again or re-shard")

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
