"""The optimiser and the learning rate of a step."""

import math

import torch
from torch import nn

from engines.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weights with decay; norms and biases (at most 1-D) without.

    Decaying norms and biases only costs accuracy (He et al., "Bag of tricks for image
    classification", section 3.1).
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; fused, which can mask a step on the device."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0) of `total_steps`: linear warm-up, then the schedule.

    The cosine is Loshchilov & Hutter, "SGDR", equation 5, without restarts.
    """
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    # The last step is not at the very end, or a run of one step would learn nothing.
    done = (step - warmup) / (total_steps - warmup)
    share = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final + (1 - config.final) * share)
