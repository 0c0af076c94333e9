"""Running statistics that do not depend on how micro-batches are spread over processes."""

import copy

import torch
from torch import nn

from engines.train.batchnorm import RunningStatistics


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5, momentum=0.3))


def test_a_step_mixes_in_the_mean_of_its_micro_batches():
    model = net()
    reference = copy.deepcopy(model)
    statistics = RunningStatistics(model)
    images = torch.randn(4, 6, 3, 8, 8)
    means, variances = [], []
    reference[1].momentum = 1.0
    for image in images:
        reference(image)
        means.append(reference[1].running_mean.clone())
        variances.append(reference[1].running_var.clone())
    for _ in range(2):
        statistics.begin_step()
        for number, image in enumerate(images):
            statistics.begin_micro_batch(number)
            model(image)
        statistics.end_step()
    expected_mean, expected_var = torch.zeros(5), torch.ones(5)
    for _ in range(2):
        expected_mean = 0.9 * expected_mean + 0.1 * torch.stack(means).mean(0)
        expected_var = 0.9 * expected_var + 0.1 * torch.stack(variances).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected_mean)
    torch.testing.assert_close(model[1].running_var, expected_var)


def test_each_norm_keeps_its_own_momentum():
    model = net()
    statistics = RunningStatistics(model)
    statistics.begin_step()
    statistics.begin_micro_batch(0)
    model(torch.randn(6, 3, 8, 8))
    batch_mean = model[3].running_mean.clone()
    statistics.end_step()
    torch.testing.assert_close(model[3].running_mean, 0.3 * batch_mean)


def test_restore_undoes_a_forward_pass_and_loading_reaches_the_flat_tensor():
    model = net()
    statistics = RunningStatistics(model)
    statistics.begin_step()
    model(torch.randn(6, 3, 8, 8))
    statistics.restore()
    assert torch.equal(model[1].running_mean, torch.zeros(5))
    state = model.state_dict()
    state["1.running_mean"] = torch.arange(5.0)
    model.load_state_dict(state)
    assert torch.equal(statistics.flat[:5], torch.arange(5.0))
