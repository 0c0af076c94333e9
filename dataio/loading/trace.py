"""Named ranges in a profiler trace; free while nothing is traced."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def record_range(name: str) -> AbstractContextManager[Any]:
    """A range of this name in the trace of `torch.profiler`, if this thread is being traced."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _NOTHING
