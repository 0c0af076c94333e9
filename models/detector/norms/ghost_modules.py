"""Batch norms whose input may hold several ghost batches, each with statistics of its own.

Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017), section 4.2. Parameters,
buffers and their names are those of torch's classes, so that `module.__class__ = ...` turns one
into the other. The plain path is the reference for the fused one; see `fused_norm`.
"""

import warnings
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Activation = Literal["none", "relu", "gelu"]
NormPath = Literal["auto", "plain", "triton"]


@cache
def triton_norms() -> Any:
    """The module `fused_norm`, or None where Triton is not installed or cannot run its kernels."""
    try:
        from models.detector.norms import fused_norm

        fused_norm.try_kernels()
    except ImportError:
        return None
    except Exception as error:  # whatever Triton meets: no C compiler, a driver that is too old
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"batch norm takes PyTorch's slower operations: Triton's kernels do not run here ({reason})",
            stacklevel=2,
        )
        return None
    return fused_norm


class GhostNorm(_BatchNorm):
    """What the ghost norms of one, two and three dimensions share.

    Attributes:
        ghosts: ghost batches in an input of the training mode: equal parts along N, in order.
        activation: applied to the output; "gelu" is the exact one.
        path: "auto" takes the Triton kernels on CUDA where they apply (a channels_last map, with
            weight and bias, in bf16, fp16 or fp32, not under torch.compile, which fuses PyTorch's
            operations itself); "plain" never does; "triton" does on the CPU too, for its
            interpreter. Set it on the class for all norms, for comparisons.
    """

    ghosts: int = 1
    activation: Activation = "none"
    path: NormPath = "auto"

    def forward(self, input: Tensor, residual: Tensor | None = None, split: bool = False) -> Any:
        """activation(norm(input) + residual), of the input's shape and dtype.

        In training mode each ghost batch is normalized by its own mean and variance, and with
        momentum m the running buffers become (1 - m) times themselves plus m times the mean of
        the ghost batches' statistics (the variance unbiased, as in torch). `num_batches_tracked`
        is left alone: counting it on the device would take a launch for each norm. Otherwise as torch's.

        Args:
            input: float [N, C, ...]. residual: of the input's shape, or None.
            split: return the output twice, for two uses, whose gradients the kernels then add.

        Raises:
            ValueError: N is not a multiple of `ghosts`, or a channel of a ghost batch has one value.
        """
        self._check_input_dim(input)
        if self.training and input.shape[0] % self.ghosts:
            raise ValueError(f"{input.shape[0]} images cannot be parted into {self.ghosts} ghost batches")
        if not self._takes_kernels(input, residual):
            output = self._activate(self._normalize(input), residual)
        elif split and self.training and type(self) is GhostBatchNorm2d:
            return self._fused(input, residual, self.activation, split=True)
        else:
            output = self._fused(input, residual, self.activation)
        return (output, output) if split else output

    def _takes_kernels(self, input: Tensor, residual: Tensor | None) -> bool:
        if (
            self.path == "plain"
            or torch.compiler.is_compiling()
            or not (input.is_cuda or self.path == "triton")
        ):
            return False
        fused, affine = triton_norms(), (self.weight, self.bias)
        if fused is None or input.dtype not in fused.FUSED_DTYPES or any(t is None for t in affine):
            return False
        if (
            input.dim() != 4
            or not input.numel()
            or not input.is_contiguous(memory_format=torch.channels_last)
        ):
            return False
        if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
            return False
        if self.training:
            return self.momentum is not None
        # Gradients through statistics that stand still (Grad-CAM) are left to PyTorch.
        needed = (t is not None and t.requires_grad for t in (input, residual, *affine))
        return self.running_mean is not None and not (torch.is_grad_enabled() and any(needed))

    def _fused(self, input: Tensor, residual: Tensor | None, activation: str, *, split: bool = False) -> Any:
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        arguments = (input, residual, self.weight, self.bias)
        options: dict[str, Any] = {"eps": self.eps, "activation": activation}
        mean, var = self.running_mean, self.running_var
        if not self.training:
            return triton_norms().fused_evaluation_norm(*arguments, mean, var, **options)
        running = (mean, var) if self.track_running_stats else None
        options |= {"ghosts": self.ghosts, "momentum": self.momentum, "split": split}
        return triton_norms().fused_training_norm(*arguments, running, **options)

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
