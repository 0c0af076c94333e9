"""Batch norms whose input may hold several ghost batches, each with statistics of its own.

Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017), section 4.2. Parameters,
buffers and their names are those of torch's classes, so that `module.__class__ = ...` turns one
into the other. The plain path is the reference for the fused one; see `fused_norm`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Activation = Literal["none", "relu", "gelu"]
NormPath = Literal["auto", "plain"]


class GhostNorm(_BatchNorm):
    """What the ghost norms of one, two and three dimensions share.

    Attributes:
        ghosts: ghost batches in an input of the training mode: equal parts along N, in order.
        activation: applied to the output; "gelu" is the exact one.
        path: "plain" keeps PyTorch's own operations; "auto" takes the Triton kernels where they
            apply. Set it on the class for all norms, for comparisons.
    """

    ghosts: int = 1
    activation: Activation = "none"
    path: NormPath = "auto"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual), of the input's shape and dtype.

        In training mode each ghost batch is normalized by its own mean and variance, and with
        momentum m the running buffers become (1 - m) times themselves plus m times the mean of
        the ghost batches' statistics (the variance unbiased, as in torch). `num_batches_tracked`
        is left alone: counting it on the device would take a launch for each norm. Otherwise as torch's.

        Args:
            input: float [N, C, ...]. residual: of the input's shape, or None.

        Raises:
            ValueError: N is not a multiple of `ghosts`, or a channel of a ghost batch has one value.
        """
        self._check_input_dim(input)
        if self.training and input.shape[0] % self.ghosts:
            raise ValueError(f"{input.shape[0]} images cannot be parted into {self.ghosts} ghost batches")
        return self._activate(self._normalize(input), residual)

    def _activate(self, output: Tensor, residual: Tensor | None) -> Tensor:
        # In place as in torchvision's blocks: batch norm's backward does not need its output.
        if residual is not None:
            output += residual
        if self.activation == "relu":
            return F.relu(output, inplace=True)
        return F.gelu(output) if self.activation == "gelu" else output

    def _normalize(self, input: Tensor) -> Tensor:
        """The norm alone, float [N, C, ...]."""
        momentum = 0.0 if self.momentum is None else self.momentum
        tracked = self.track_running_stats or not self.training
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        if not self.training or self.ghosts == 1:
            batch = self.training or mean is None
            return F.batch_norm(input, mean, var, self.weight, self.bias, batch, momentum, self.eps)
        if torch.compiler.is_compiling():
            return self._at_once(input, mean, var, momentum)
        # With momentum 1 the buffers given become the statistics of that ghost batch.
        means, variances = (None if b is None else b.new_zeros(self.ghosts, len(b)) for b in (mean, var))
        parts = [
            F.batch_norm(
                part,
                None if means is None else means[ghost],
                None if variances is None else variances[ghost],
                self.weight,
                self.bias,
                True,
                1.0,
                self.eps,
            )
            for ghost, part in enumerate(input.chunk(self.ghosts))
        ]
        if mean is not None and var is not None and means is not None and variances is not None:
            mean.lerp_(means.mean(0), momentum)
            var.lerp_(variances.mean(0), momentum)
        return torch.cat(parts)

    def _at_once(self, input: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> Tensor:
        """The same without a loop over ghost batches, which would multiply the time to compile."""
        ghosts = input.unflatten(0, (self.ghosts, -1))
        count = ghosts[0, :, 0].numel()
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {input.shape}")
        ghosts = ghosts if input.dtype == torch.float64 else ghosts.float()
        dims = [dim for dim in range(ghosts.dim()) if dim not in (0, 2)]
        variances, means = torch.var_mean(ghosts, dims, correction=0, keepdim=True)
        output = (ghosts - means) * torch.rsqrt(variances + self.eps)
        shape = (-1, *[1] * (input.dim() - 2))
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        if mean is not None and var is not None:
            with torch.no_grad():
                mean.lerp_(means.flatten(1).mean(0).to(mean.dtype), momentum)
                var.lerp_(variances.flatten(1).mean(0).to(var.dtype) * (count / (count - 1)), momentum)
        return output.flatten(0, 1).to(input.dtype)


class GhostBatchNorm1d(GhostNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d over ghost batches: float [N, C] or [N, C, L]."""


class GhostBatchNorm2d(GhostNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d over ghost batches: float [N, C, H, W]."""


class GhostBatchNorm3d(GhostNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d over ghost batches: float [N, C, D, H, W]."""
