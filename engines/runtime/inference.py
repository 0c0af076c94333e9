"""Forward passes without gradients: how many images at a time, and results that the host does not wait for."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch

# A ResNet-50's pass of 256 images of 224 px keeps a GPU busy for longer than the host takes to launch it.
_PIXELS = 256 * 224 * 224
_MOST = 1024
_AHEAD = 2


def inference_batch(size: int, least: int, device: torch.device) -> int:
    """Images per forward pass without gradients.

    Args:
        size: side of the images, pixels. least: what a CPU takes, too.

    Returns:
        on a GPU at least as many as have the pixels of 256 images of 224 px, but not more than 1,024.
    """
    return max(least, min(_MOST, _PIXELS // size**2)) if device.type == "cuda" else least


class HostCopy:
    """Results on their way from the device to the host.

    Args:
        tensors: all on one device. On a GPU they are copied into pinned memory in the current stream, and
            the host goes on; on a CPU they stay what they are.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if tensors[0].device.type == "cuda":
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            self._done = torch.cuda.Event(blocking=True)
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once the device has done what was queued before the copy."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def fetch_late(copies: Iterable[HostCopy], ahead: int = _AHEAD) -> Iterator[list[torch.Tensor]]:
    """The results in their order, each when `ahead` later ones are queued: the device always has work.

    So the host is that far ahead of the device at most, and pinned memory is used again.
    """
    waiting: deque[HostCopy] = deque()
    for copy in copies:
        waiting.append(copy)
        if len(waiting) > ahead:
            yield waiting.popleft().wait()
    while waiting:
        yield waiting.popleft().wait()
