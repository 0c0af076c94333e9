"""The optimizer, and the learning rate of a step."""

import math

import torch
from torch import nn

from engines.config.detector import OptimConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, *, norms: bool = False
) -> list[dict[str, object]]:
    """Two groups: weights with decay; norms and biases (at most 1-D) without, unless `norms`.

    Decaying norms and biases only costs accuracy (He et al., "Bag of tricks for image
    classification", section 3.1). Frozen parameters are included: they have no gradient,
    and the optimizer leaves those alone until they have.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": weight_decay if norms else 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; fused, which can mask a step on the device."""
    groups = parameter_groups(model, config.weight_decay, norms=config.decay_norms)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        if config.momentum:
            # If the first step were masked, the fused update would keep uninitialized buffers.
            for parameter in model.parameters():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def rate_scale(config: OptimConfig, global_batch: int) -> float:
    """What `lr` and `frozen_lr` are multiplied by at this global batch; 1 without `lr_batch`.

    The linear scaling rule: k times the batch, k times the rate (Goyal et al., "Accurate, large minibatch
    SGD", 2017, section 2.1; they warm up over 5 epochs and show it to hold up to 8,192 images).
    """
    return global_batch / config.lr_batch if config.lr_batch else 1.0


def learning_rate(
    config: OptimConfig,
    step: int,
    total_steps: int,
    *,
    global_batch: int = 0,
    frozen_steps: int = 0,
    cuts: int = 0,
) -> float:
    """The rate of step `step` (from 0) of `total_steps`: linear warm-up, then the schedule.

    The cosine is Loshchilov & Hutter, "SGDR", equation 5, without restarts.

    Args:
        global_batch: images of a step, for `rate_scale`; needed where `config.lr_batch` is set.
        frozen_steps: at the start, in which only the heads learn; with `config.frozen_lr` they
            have that rate, and warm-up and schedule follow in the steps after them.
        cuts: how often the plateau schedule has cut the rate so far.
    """
    assert global_batch or not config.lr_batch
    scale = rate_scale(config, global_batch)
    if config.frozen_lr:
        if step < frozen_steps:
            return scale * config.frozen_lr
        step, total_steps = step - frozen_steps, total_steps - frozen_steps
    warmup = round(config.warmup * total_steps)
    peak = scale * config.lr * config.plateau_factor**cuts
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule in ("constant", "plateau"):
        return peak
    # The last step is not at the very end: a run of one step would have a rate of 0.
    done = (step - warmup) / (total_steps - warmup)
    share = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (config.final + (1 - config.final) * share)
