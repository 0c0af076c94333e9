"""What batch norm, activation and residual addition move through a GPU's memory: counted, not measured.

The fused path reads and writes the values of each norm this often (see `fused_norm`):

| | without a residual | with one |
|---|---|---|
| statistics | x | x |
| output | x, y | x, residual, y |
| sums of the gradients | dy, x | dy, x, y, and dz is written |
| gradient of the input | dy, x, dx | dz, x, dx |
| together | 8 | 11 |

A norm with a residual but no activation has no dz of its own: 9. Where a block hands its output to the
next one twice (`fused_blocks.FusedStage`), the sums read two gradients, 12 in all; PyTorch's own
addition of the two would take 3 more. Everything else (statistics, partial
sums) is less than a hundredth.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.detector.norms.ghost_modules import GhostNorm

LAUNCHES = 6  # of a norm, forward and backward


@dataclass(frozen=True)
class NormTraffic:
    """Of one forward and backward pass over all fused norms of a network.

    Attributes:
        norms, launches: their number, and that of their kernels.
        values: outputs of all norms, for all images.
        read, written: bytes.
    """

    norms: int
    launches: int
    values: int
    read: int
    written: int

    @property
    def passes(self) -> float:
        """How often a value is read or written, on average."""
        return (self.read + self.written) / max(1, self.values) / 2

    def milliseconds(self, bandwidth: float) -> float:
        """The time that the bytes take at `bandwidth`, bytes/s, reads and writes together."""
        return (self.read + self.written) / bandwidth * 1e3


@torch.no_grad()
def norm_traffic(model: nn.Module, images: int, size: int) -> NormTraffic:
    """The traffic of `images` images in bf16 or fp16, at 2 bytes a value.

    Args:
        model: after `use_ghost_norms`; on any device; runs one image in evaluation mode and is
            otherwise unchanged.
        images: of one pass. size: side of the image, pixels.
    """
    found: list[tuple[int, int, int]] = []

    def note(norm: nn.Module, args: tuple[Any, ...]) -> None:
        values = images * args[0].numel()
        residual = len(args) > 1 and args[1] is not None
        masked = residual and getattr(norm, "activation", "none") != "none"
        split = masked and args[2:] == (True,)
        found.append((values, 6 + residual + masked + split, 2 + masked))

    modes = [(module, module.training) for module in model.modules()]
    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, GhostNorm)]
    try:
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return NormTraffic(
        norms=len(found),
        launches=LAUNCHES * len(found),
        values=sum(values for values, _, _ in found),
        read=2 * sum(values * reads for values, reads, _ in found),
        written=2 * sum(values * writes for values, _, writes in found),
    )
