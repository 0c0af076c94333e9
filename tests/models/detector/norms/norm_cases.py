"""Cases for the fused norm and their float64 references, for the interpreter and for a GPU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.detector.norms.fused_norm import fused_training_norm

EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Case:
    ghosts: int
    images: int  # of one ghost batch
    channels: int
    height: int
    width: int
    activation: str = "relu"
    residual: bool = True
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    std: float = 1.0

    @property
    def shape(self):
        return (self.ghosts * self.images, self.channels, self.height, self.width)


def inputs(case, device):
    """x, residual, dy in channels_last; weight, bias, running mean and variance."""
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(case.shape, generator=generator) for _ in range(3)]
    maps[0] = maps[0] * case.std + case.mean
    # Ghost batches differ, so that statistics of the wrong one show.
    maps[0] += torch.arange(case.ghosts).repeat_interleave(case.images).view(-1, 1, 1, 1) * case.std
    x, residual, dy = (m.to(device, case.dtype).contiguous(memory_format=torch.channels_last) for m in maps)
    weight, bias, mean, var = torch.randn(4, case.channels, generator=generator).to(device)
    weight, var = weight.abs() + 0.5, var.abs()
    if case.activation == "relu":  # on which side of zero a value falls may be a matter of rounding
        dy[before_activation(case, x, residual, weight, bias)[0].abs() < 1e-4] = 0
    return x, residual, dy, weight, bias, mean, var


def before_activation(case, x, residual, weight, bias):
    """By the definition, in float64; also the mean and the biased variance of each ghost batch."""
    x, residual, weight, bias = (t.double() for t in (x, residual, weight, bias))
    parts = x.unflatten(0, (case.ghosts, case.images))
    means = parts.mean((1, 3, 4), keepdim=True)
    variances = parts.var((1, 3, 4), correction=0, keepdim=True)
    z = ((parts - means) / (variances + EPS).sqrt()).flatten(0, 1)
    z = z * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return z + residual if case.residual else z, means.flatten(1), variances.flatten(1)


def fused(case, device):
    """Output, gradients of x, residual, weight and bias, running mean and variance."""
    x, residual, dy, weight, bias, mean, var = inputs(case, device)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y = fused_training_norm(
        x,
        residual if case.residual else None,
        weight,
        bias,
        (mean, var),
        ghosts=case.ghosts,
        momentum=MOMENTUM,
        eps=EPS,
        activation=case.activation,
    )
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    y.backward(dy)
    return named(y.detach(), *(leaf.grad for leaf in leaves), mean, var)


def reference(case, device):
    """The same by the definition, in float64 from the same rounded numbers."""
    x, residual, dy, weight, bias, mean, var = (t.double() for t in inputs(case, device))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    z, means, variances = before_activation(case, x, residual, weight, bias)
    y = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu}[case.activation](z)
    y.backward(dy)
    rows = case.images * case.height * case.width
    mean = (1 - MOMENTUM) * mean + MOMENTUM * means.mean(0)
    var = (1 - MOMENTUM) * var + MOMENTUM * variances.mean(0) * rows / (rows - 1)
    return named(y.detach(), *(leaf.grad for leaf in leaves), mean.detach(), var.detach())


def named(*values):
    names = ("output", "x", "residual", "weight", "bias", "running mean", "running variance")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def check(case, device, ulps=1):
    """Half precision within `ulps` units in the last place, float32 sums within rounding."""
    rounding = {torch.float32: 2e-6, torch.float16: 2**-10 * ulps, torch.bfloat16: 2**-7 * ulps}[case.dtype]
    # The mean of float32 values is known to their last place, which large means make coarse.
    rounding += 2**-23 * abs(case.mean) / case.std * 4
    found, expected = fused(case, device), reference(case, device)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = 2e-6 + 2**-23 * abs(case.mean) / case.std * 4
        rtol = rounding if name in ("output", "x", "residual") else exact
        scale = value.abs().max().item()
        atol = scale * max(exact, rtol / 32)
        torch.testing.assert_close({name: found[name].double()}, {name: value}, rtol=rtol, atol=atol)
