"""Named ranges in a profiler trace; free while nothing is traced."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()
_tracing = False


def trace_ranges(on: bool) -> None:
    """Whether `record_range` makes ranges from now on, in every thread: while a profiler runs."""
    global _tracing
    _tracing = on


def record_range(name: str) -> AbstractContextManager[Any]:
    """A range of this name in the trace of `torch.profiler`, while `trace_ranges` is on."""
    return torch.profiler.record_function(name) if _tracing else _NOTHING
