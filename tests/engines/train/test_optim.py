"""The schedule, the parameter groups and the device-side mask of the update."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from engines.config.detector import OptimConfig
from engines.train.optim import build_optimizer, learning_rate, rate_scale


def rates(total=100, **settings):
    config = OptimConfig(lr=0.4, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_cosine_with_warmup_rises_to_the_peak_and_falls_to_the_end():
    found = rates(warmup=0.1, final=0.05)
    assert found[0] == pytest.approx(0.04) and found[9] == pytest.approx(0.4)
    assert 0.02 < found[-1] < 0.0205
    assert all(a > b for a, b in pairwise(found[10:]))
    assert found[55] == pytest.approx(0.4 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 2))))


def test_linear_and_constant():
    assert rates(schedule="linear", warmup=0)[50] == pytest.approx(0.2)
    assert set(rates(schedule="constant", warmup=0)) == {0.4}


def test_a_run_of_one_step_takes_it():
    assert rates(total=1, warmup=0.1) == [0.4]


def test_rates_stand_as_they_are_unless_they_are_said_to_be_for_another_batch():
    plain, scaled = OptimConfig(lr=0.1, frozen_lr=0.03), OptimConfig(lr=0.1, frozen_lr=0.03, lr_batch=256)
    options = {"total_steps": 40, "frozen_steps": 10}
    for step in (0, 9, 10, 25, 39):  # the heads' constant rate, the warm-up, the schedule
        here = learning_rate(plain, step, global_batch=4096, **options)
        assert here == learning_rate(plain, step, **options)
        assert learning_rate(scaled, step, global_batch=256, **options) == here
        assert learning_rate(scaled, step, global_batch=4096, **options) == pytest.approx(16 * here)
    # Goyal et al. 2017: 0.1 for 256 images, 3.2 for 8,192.
    assert rate_scale(scaled, 8192) * scaled.lr == pytest.approx(3.2)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_weights_decay(name):
    net = model()
    optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0))
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        expected = old * (1 - 0.1 * 0.5) if old.ndim > 1 else old
        torch.testing.assert_close(new.detach(), expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_found_inf_masks_the_update_on_the_device(name):
    # What the trainer relies on to stop before the update without asking the GPU.
    net = model()
    optimizer = build_optimizer(net, OptimConfig(name=name))
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    vars(optimizer).update(found_inf=torch.ones(()), grad_scale=None)
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.equal(old, new.detach())
