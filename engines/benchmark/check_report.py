"""What a part of a GPU check is given, and how it reports: one JSON line for each figure, as it comes."""

import gc
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch

from dataio.core.errors import UserError
from engines.benchmark.case import BenchmarkSettings, Unavailable

_LONGEST = 600  # characters of an error


@dataclass(frozen=True)
class CheckTask:
    """A part's work.

    Attributes:
        settings: of the benchmark's cases. tiny: only whether all of it works.
        repeats: timed windows of each case. cifake: folder of CIFAKE's shards, "" for none.
        gpus: of a check of several (on a CPU: processes), 0 for a check of one.
    """

    settings: BenchmarkSettings
    tiny: bool
    repeats: int
    cifake: str
    gpus: int = 0


def encode_task(task: CheckTask) -> str:
    """A task as an argument of another process."""
    return json.dumps(asdict(task))


def decode_task(text: str) -> CheckTask:
    """The inverse of `encode_task`."""
    values = json.loads(text)
    return CheckTask(**{**values, "settings": BenchmarkSettings(**values["settings"])})


class Reporter:
    """Writes figures and errors to the process that waits for them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def figure(self, name: str, value: float, unit: str, **details: Any) -> None:
        """A figure of the part, and plain values that explain it."""
        self._write({"figure": name, "value": value, "unit": unit, **details})

    def failed(self, what: str, error: str) -> None:
        """What could not be measured, and why."""
        self._write({"failed": what, "error": error[-_LONGEST:]})

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Report an error instead of raising it, so that the part's other figures are measured.

        The device's memory is free afterwards, as far as nothing else refers to it.
        """
        try:
            yield
        except (UserError, Unavailable) as error:
            self.failed(what, str(error))
        except Exception:
            self.failed(what, traceback.format_exc())
        finally:
            gc.unfreeze()
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
