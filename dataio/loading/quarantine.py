"""Samples that a run skips because they can no longer be read or decoded.

In training another sample takes the place, with the place's own augmentation. Which one is
a pure function of the damaged sample's id, and it has the same generator and its object is
known where the other's was; so the class frequencies, the loss's divisors, the order of all
other samples and exact resume are unchanged, on any number of processes. (Giving the
place no weight instead would change the divisors, which every process counts for itself
from the order.) In validation the sample is left out.

The skipped samples are listed in a file of the run, one line each, so that a continued run skips
the same samples even if the shard was repaired meanwhile.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataio.core.counter_rng import PURPOSE_SUBSTITUTE, hash64
from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import DamagedSample

_BLOCK = 4096  # candidates drawn together
_BLOCKS = 16


class Quarantine:
    """The skipped samples of one split.

    Args:
        path: the run's file, which all its processes append to. cap: the largest share of
            the split that may be skipped; rounded up to whole samples.
    """

    def __init__(self, shards: ShardSet, path: str | Path, cap: float) -> None:
        self._shards, self.path = shards, Path(path)
        self.allowed = math.ceil(cap * len(shards))
        self._lock = threading.Lock()  # several loaders may share it
        self.ids = self._read()

    def _read(self) -> set[int]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return set()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); fix or remove it") from None
        ids = set()
        for line in lines:
            try:
                entry = json.loads(line)
                number = int(entry["sample_id"])
                if entry["split"] == self._shards.split and 0 <= number < len(self._shards):
                    ids.add(number)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # half a line of a killed process: its sample will be found again
        return ids

    def add(self, sample_id: int, error: DamagedSample, warn: Callable[[str], object] = log.warning) -> None:
        """Skip a sample from now on, and warn of it.

        Args:
            warn: is told; a thread's messages are for who takes its batches.

        Raises:
            UserError: more than `allowed` are skipped.
        """
        with self._lock:
            others = self._read()  # found by the other processes
            self.ids = self.ids | {sample_id, *others}
            if sample_id not in others:
                self._append(sample_id, error)
            found = len(self.ids)
        if found > self.allowed:
            raise UserError(
                f"{error}. {found} samples of the {self._shards.split} split are damaged by now, and "
                f"data.damaged_cap allows {self.allowed}; repair the shards, or raise it ({self.path} lists them)"
            )
        warn(f"{error}. It is left out ({found} of at most {self.allowed}, see {self.path})")

    def _append(self, sample_id: int, error: DamagedSample) -> None:
        row = self._shards.rows[sample_id]
        entry: dict[str, Any] = {
            "split": self._shards.split,
            "sample_id": sample_id,
            "shard": self._shards.shards[int(row["shard"])]["file"],
            "key": int(row["key"]),
            "offset": int(row["offset"]),
            "source": error.source,
            "reason": error.reason,
        }
        # One write to the end, so that lines of several processes stay whole.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def candidates(self, sample_id: int) -> Iterator[int]:
        """The sample itself, then its substitutes in a fixed order, without skipped ones.

        Raises:
            UserError: there is none.
        """
        if sample_id not in self.ids:
            yield sample_id
        rows = self._shards.rows
        row = rows[sample_id]
        for block in range(_BLOCKS):
            numbers = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
            drawn = (hash64(PURPOSE_SUBSTITUTE, sample_id, numbers) % np.uint64(len(rows))).astype(np.int64)
            drawn_rows = rows[drawn]
            fits = (drawn_rows["generator"] == row["generator"]) & (
                (drawn_rows["object"] >= 0) == (row["object"] >= 0)
            )
            for candidate in drawn[fits].tolist():
                if candidate not in self.ids:
                    yield candidate
        raise UserError(
            f"{self._shards.describe(sample_id)} is damaged, and no other sample of its generator can take its "
            "place; repair the shards"
        )
