"""A process that will not end after its work is done is ended, with the exit code it had earned.

What keeps one: a thread of a library that waits for a server, a communicator whose peers have left.
The run is whole by then, and its machine would idle until the allocation is over.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

END_SECONDS = 60.0


def end_in(seconds: float, code: int, what: str) -> threading.Timer:
    """End this process with `code` unless the returned timer is cancelled, or it ends by itself, before.

    Args:
        what: has not ended then; the warning begins with it.
    """

    def end() -> None:
        others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
        frames = sys._current_frames()
        at = []
        for thread in others:
            # Daemons keep no process.
            if (frame := frames.get(thread.ident or 0)) is not None and not thread.daemon:
                place = f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"
                at.append(f"{thread.name} in {place}, line {frame.f_lineno}")
        message = (
            f"{what} has not ended in {seconds:.0f} s, and is ended with exit code {code}: {'; '.join(at)}"
        )
        # Not by the log: its lock may be what is waited for.
        os.write(2, f"warning: {message}\n".encode())
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.name, timer.daemon = "ending", True
    timer.start()
    return timer


@contextlib.contextmanager
def ended_in(seconds: float, code: int, what: str) -> Iterator[None]:
    """End this process with `code` where the block takes longer."""
    timer = end_in(seconds, code, what)
    try:
        yield
    finally:
        timer.cancel()
