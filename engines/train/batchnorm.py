"""Batch norm whose running statistics do not depend on the number of processes.

Statistics are per micro-batch. A step sees several micro-batches, on one rank or on
many; its contribution to the running statistics is their plain mean, mixed in once per
step with the usual momentum. Updating in sequence instead, as nn.BatchNorm2d does, would
give one process with 4 micro-batches other statistics than 4 processes with one each.
"""

import torch
from torch import nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RunningStatistics:
    """All running means and variances of a model as one flat tensor.

    The buffers become views of `flat`, so one collective and one operation serve all.
    Create it after the model is on its device.

    Attributes:
        flat: float32 [S], all running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
        self._momentum = [0.1 if norm.momentum is None else norm.momentum for norm in self._norms]
        buffers = [b for norm in self._norms for b in (norm.running_mean, norm.running_var) if b is not None]
        parameter = next(model.parameters())
        if not buffers:
            self.flat = torch.zeros(0, device=parameter.device)
        else:
            self.flat = torch.cat([b.detach().float() for b in buffers])
        offset = 0
        weights = []
        for norm, momentum in zip(self._norms, self._momentum, strict=True):
            for name in ("running_mean", "running_var"):
                size = getattr(norm, name).numel()
                setattr(norm, name, self.flat[offset : offset + size])
                offset += size
                weights.append(torch.full((size,), momentum))
        self._weight = torch.cat(weights).to(self.flat.device) if weights else self.flat
        self._before = self.flat.clone()

    def begin_step(self) -> None:
        """Remember the statistics before the step's first micro-batch."""
        self._before.copy_(self.flat)

    def begin_micro_batch(self, number: int) -> None:
        """Let micro-batch `number` (from 0) average into those before it.

        A momentum of 1 / (number + 1) makes the buffers the plain mean of the batch
        statistics so far. It is a Python float, so nothing waits for the device.
        """
        for norm in self._norms:
            norm.momentum = 1.0 / (number + 1)

    def end_step(self) -> None:
        """Mix the step's mean, by now averaged over ranks, into the running statistics."""
        torch.lerp(self._before, self.flat, self._weight, out=self.flat)

    def restore(self, where: torch.Tensor | None = None) -> None:
        """Undo what happened since `begin_step`, or only if `where` (bool []) is true, on the device."""
        self.flat.copy_(self._before if where is None else torch.where(where, self._before, self.flat))
