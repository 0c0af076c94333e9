"""Names for stretches of time in a trace; free of cost while nothing is traced."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def record_range(name: str) -> AbstractContextManager[Any]:
    """A range of this name in the trace of `torch.profiler`, where this thread is being traced."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _NOTHING
