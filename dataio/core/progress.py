"""Progress of long work on the standard error."""

import sys
import time

from tqdm import tqdm

from dataio.core.log import progress


class ProgressBar:
    """A bar on a terminal, a line every 30 seconds in a log."""

    def __init__(self, total: int, done: int, quiet: bool, what: str = "sharded") -> None:
        self._total, self._done, self._quiet, self._what = total, done, quiet, what
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True)
        self._spoke = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._spoke > 30:
            self._spoke = time.monotonic()
            progress.info(f"{self._done}/{self._total} images {self._what}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
