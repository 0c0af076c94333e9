"""Work that is done ahead in a thread of its own, a few items at a time."""

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")

_PATIENCE = 30.0  # seconds that the end of the process waits for an item that is being made


class _Worker(Generic[Item]):
    """The thread's side. It knows nothing of who takes the items, so that these can be forgotten."""

    def __init__(self, make: Callable[[], Iterator[Item]], depth: int, name: str) -> None:
        self._make = make
        # SimpleQueue.put may be called by a finalizer at any time, in any thread; a lock may not.
        self.slots: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.ready: SimpleQueue[tuple[Item] | BaseException] = SimpleQueue()
        self._stopped = False
        for _ in range(depth):
            self.slots.put(None)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        _running.add(self)
        self._thread.start()

    def _work(self) -> None:
        items: Iterator[Item] | None = None
        try:
            items = self._make()
            while True:
                free = self.slots.get()
                if self._stopped:
                    return
                if free is not None:
                    free()
                self.ready.put((next(items),))
        except BaseException as error:  # whoever takes the items is told, whatever it is
            self.ready.put(error)
        finally:
            try:
                close = getattr(items, "close", None)  # of a generator
                if close is not None:
                    close()  # here: nobody else may destroy what this thread has used
            finally:
                _running.discard(self)

    def stop(self) -> None:
        """Let the thread end after the item that it is at; does not wait for it."""
        self._stopped = True
        self.slots.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join(_PATIENCE)


_running: set[_Worker] = set()


def _end_all() -> None:
    for worker in list(_running):
        worker.stop()
    for worker in list(_running):
        worker.join()


class Ahead(Generic[Item]):
    """Iterates what `make` gives, in a thread that is up to `depth` items ahead.

    The items come in order; what the iterator raises is raised in its place, in the thread that takes
    the items, with the traceback of where it happened. The thread starts with the first `next` and
    ends with the last item, with `close`, when the iterator is forgotten, or with the process.

    Args:
        make: called in the thread; a generator is closed there, too.
        depth: the most items that are made and not taken.
        name: of the thread.
    """

    _exits = False  # whether the threads are ended with the process

    def __init__(self, make: Callable[[], Iterator[Item]], depth: int, name: str) -> None:
        self._worker: _Worker[Item] | None = _Worker(make, depth, name)
        self._started = False

    def __iter__(self) -> "Ahead[Item]":
        return self

    def __next__(self) -> Item:
        return self.take(None)

    def take(self, free: Callable[[], object] | None) -> Item:
        """The next item.

        Args:
            free: called in the thread before it makes the item `depth` places behind this one, to
                wait there for whatever still holds memory.
        """
        worker = self._worker
        if worker is None:
            raise StopIteration
        if not self._started:
            self._start(worker)
        made = worker.ready.get()
        if isinstance(made, tuple):
            worker.slots.put(free)
            return made[0]
        self._worker = None
        try:
            raise made
        finally:
            del made  # its traceback has this frame

    def _start(self, worker: _Worker[Item]) -> None:
        if not Ahead._exits:
            # Handlers run in reverse: before those of the libraries imported by now, which would
            # destroy what the threads are using.
            Ahead._exits = True
            atexit.register(_end_all)
        self._started = True
        weakref.finalize(self, worker.stop).atexit = False
        worker.start()

    def close(self) -> None:
        """End the thread and wait for it; there are no more items."""
        worker, self._worker = self._worker, None
        if worker is not None and self._started:
            worker.stop()
            worker.join()
