"""Batch norm whose running statistics do not depend on processes or on the size of a pass.

Statistics are per micro-batch (a ghost batch). A step sees several, in one forward pass or many,
on one rank or many; its contribution to the running statistics is their plain mean, mixed in once
per step with the usual momentum. Updating in sequence instead, as nn.BatchNorm2d does, would
give one process with 4 micro-batches other statistics than 4 processes with one each.
"""

import torch
from torch import nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RunningStatistics:
    """All running means and variances of a model as one flat tensor, and their sums over a step.

    The buffers become views of `flat`, so one collective and one operation serve all, and the
    norms' momentum becomes 1: after a forward pass they hold its micro-batches' mean statistics.
    `num_batches_tracked` counts the micro-batches of all ranks. Create it after the model is
    on its device. Nothing here waits for the device.

    Attributes:
        flat: float32 [S], all running statistics. sums: float64 [S], the sums over this rank's
            micro-batches of the step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
        device = next(model.parameters()).device
        means = [b for norm in self._norms for b in (norm.running_mean, norm.running_var) if b is not None]
        self.flat = torch.cat([torch.zeros(0, device=device), *(b.detach().float() for b in means)])
        counts = [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]
        self._tracked = torch.tensor([int(count) for count in counts], dtype=torch.int64, device=device)
        offset = 0
        weights = [torch.zeros(0)]
        for number, norm in enumerate(self._norms):
            momentum = 0.1 if norm.momentum is None else norm.momentum
            norm.momentum = 1.0
            for name in ("running_mean", "running_var"):
                size = getattr(norm, name).numel()
                setattr(norm, name, self.flat[offset : offset + size])
                offset += size
                weights.append(torch.full((size,), momentum))
            norm.num_batches_tracked = self._tracked[number]
        self._weight = torch.cat(weights).to(device)
        self.sums = torch.zeros_like(self.flat, dtype=torch.float64)
        self._before, self._tracked_before = self.flat.clone(), self._tracked.clone()
        self._training: dict[tuple[bool, ...], torch.Tensor] = {}

    def begin_step(self) -> None:
        """Remember the statistics before the step's first micro-batch."""
        self._before.copy_(self.flat)
        self._tracked_before.copy_(self._tracked)
        self.sums.zero_()

    def end_pass(self, micro_batches: int) -> None:
        """Count a forward pass of so many micro-batches, whose mean statistics `flat` has."""
        self.sums.add_(self.flat, alpha=micro_batches)

    def end_step(self, micro_batches: int) -> None:
        """Mix the mean over the step's micro-batches into the running statistics.

        Args:
            micro_batches: of the step, over all ranks; `sums` are over all ranks by now.
        """
        torch.lerp(self._before, (self.sums / micro_batches).float(), self._weight, out=self.flat)
        torch.add(self._tracked_before, self._learning(), alpha=micro_batches, out=self._tracked)

    def _learning(self) -> torch.Tensor:
        """1 for each norm in training mode, 0 for those of a frozen backbone; int64 [norms]."""
        key = tuple(norm.training for norm in self._norms)
        if key not in self._training:
            self._training[key] = torch.tensor(key, dtype=torch.int64).to(self.flat.device)
        return self._training[key]

    def restore(self, where: torch.Tensor | None = None) -> None:
        """Undo what happened since `begin_step`, or only if `where` (bool []) is true, on the device."""
        for now, before in ((self.flat, self._before), (self._tracked, self._tracked_before)):
            now.copy_(before if where is None else torch.where(where, before, now))
