"""An exponential average of a model's weights and running statistics."""

import copy

import torch
from torch import nn


class WeightAverage:
    """The average; what is validated and kept as best where `train.ema` is set.

    Early on the decay is (1 + steps) / (10 + steps), as in TensorFlow's ExponentialMovingAverage;
    otherwise the random start would dominate for 1 / (1 - decay) steps. torch's AveragedModel
    computes the same sum, but reads its counter from the device in every step.

    Attributes:
        module: a copy of the model with the averaged state, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages, self._values = self._floats(self.module), self._floats(model)

    @staticmethod
    def _floats(module: nn.Module) -> list[torch.Tensor]:
        return [t.detach() for t in module.state_dict().values() if t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the model's state after `step` steps (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
