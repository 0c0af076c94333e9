"""Running statistics that do not depend on how micro-batches are spread over processes."""

import torch
from torch import nn

from engines.train.batchnorm import RunningStatistics
from models.detector.norms.ghost_norm import set_ghosts, use_ghost_norms


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5, momentum=0.3))


def test_a_step_mixes_in_the_mean_of_its_micro_batches_whatever_a_pass_holds():
    images = torch.randn(4, 6, 3, 8, 8)
    reference = net()
    means, variances = [], []
    reference[1].momentum = 1.0
    for image in images:
        reference(image)
        means.append(reference[1].running_mean.clone())
        variances.append(reference[1].running_var.clone())
    expected_mean, expected_var = torch.zeros(5), torch.ones(5)
    for _ in range(2):
        expected_mean = 0.9 * expected_mean + 0.1 * torch.stack(means).mean(0)
        expected_var = 0.9 * expected_var + 0.1 * torch.stack(variances).mean(0)
    for sizes in [(1, 1, 1, 1), (2, 2), (3, 1), (4,)]:
        model = net()
        assert use_ghost_norms(model) == []
        statistics = RunningStatistics(model)
        for _ in range(2):
            statistics.begin_step()
            at = 0
            for size in sizes:
                set_ghosts(model, size)
                model(images[at : at + size].flatten(0, 1))
                statistics.end_pass(size)
                at += size
            statistics.end_step(4)
        torch.testing.assert_close(model[1].running_mean, expected_mean)
        torch.testing.assert_close(model[1].running_var, expected_var)
        assert model[1].num_batches_tracked == model[3].num_batches_tracked == 8


def test_each_norm_keeps_its_own_momentum():
    model = net()
    statistics = RunningStatistics(model)
    statistics.begin_step()
    model(torch.randn(6, 3, 8, 8))
    batch_mean = model[3].running_mean.clone()
    statistics.end_pass(1)
    statistics.end_step(1)
    torch.testing.assert_close(model[3].running_mean, 0.3 * batch_mean)


def test_norms_of_a_frozen_backbone_do_not_change_and_do_not_count():
    model = net()
    model[1].running_mean.fill_(1 / 3)
    statistics = RunningStatistics(model)
    model[1].eval()
    statistics.begin_step()
    for _ in range(3):
        model(torch.randn(6, 3, 8, 8))
        statistics.end_pass(1)
    statistics.end_step(3)
    assert torch.equal(model[1].running_mean, torch.full((5,), 1 / 3))
    assert (int(model[1].num_batches_tracked), int(model[3].num_batches_tracked)) == (0, 3)


def test_restore_undoes_a_forward_pass_and_loading_reaches_the_flat_tensor():
    model = net()
    statistics = RunningStatistics(model)
    statistics.begin_step()
    model(torch.randn(6, 3, 8, 8))
    statistics.restore()
    assert torch.equal(model[1].running_mean, torch.zeros(5))
    assert model[1].num_batches_tracked == 0
    state = model.state_dict()
    state["1.running_mean"] = torch.arange(5.0)
    model.load_state_dict(state)
    assert torch.equal(statistics.flat[:5], torch.arange(5.0))
