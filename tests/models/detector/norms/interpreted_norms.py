"""The fused norm in Triton's interpreter; `test_fused_norm.py` runs this file under TRITON_INTERPRET=1."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from models.detector.backbones.cifarnet import CifarNet
from models.detector.norms.fused_norm import tiling
from models.detector.norms.fused_pool import fused_max_pool
from models.detector.norms.ghost_modules import GhostBatchNorm2d, GhostNorm
from models.detector.norms.ghost_norm import set_ghosts, use_ghost_norms
from tests.models.detector.norms.norm_cases import Case, check, fused, inputs

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton was or would be imported without its interpreter"


def test_the_sizes_below_have_tails_and_several_splits():
    plan = tiling(31 * 21, 24, 1)
    assert plan.cols > 24 and 31 * 21 % plan.reduce_rows and 31 * 21 % plan.map_rows
    assert (plan.splits, plan.reduce_tiles) == (4, 11)
    # Behind its first tile a split has one or two; below, four to seven; the kernel takes four at a time.
    assert [tiling(rows, 24, 1).reduce_tiles for rows in (1409, 17 * 113)] == [23, 31]
    assert [rows % 64 for rows in (1409, 17 * 113)] == [1, 1]
    assert tiling(1, 64, 132).splits == 1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_variant_follows_its_definition(dtype, activation, residual):
    # Behind GELU dz is rounded before dx is; the interpreter cuts bits off where a GPU rounds.
    ulps = 3 if residual and activation == "gelu" else 1
    check(Case(2, 1, 24, 31, 21, activation, residual, dtype), "cpu", ulps)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 136, 13, 11),  # two blocks of channels, the second with a tail
        Case(3, 1, 48, 37, 3, residual=False),
        Case(5, 1, 64, 3, 2),
        Case(1, 1, 24, 1409, 1),
        Case(1, 1, 24, 17, 113, residual=False),
        Case(2, 2, 1, 3, 5, residual=False),
        Case(2, 1, 24, 20, 33, "none", False, mean=1000.0, std=0.5),
    ],
    ids=str,
)
def test_odd_sizes_and_cancellation(case):
    check(case, "cpu")


def test_sums_of_squares_would_fail_the_test_of_cancellation():
    x = inputs(Case(2, 1, 24, 20, 33, mean=1000.0, std=0.5), "cpu")[0]
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    true = x.double().var((0, 2, 3), correction=0)
    assert ((naive - true).abs() / true).max() > 0.01


def test_bits_repeat_and_do_not_depend_on_the_ghost_batches_beside():
    case = Case(3, 1, 24, 31, 21)
    first, again = fused(case, "cpu"), fused(case, "cpu")
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    x, residual, dy, weight, bias, *_ = inputs(case, "cpu")
    norm = GhostBatchNorm2d(24)
    norm.weight.data, norm.bias.data, norm.activation, norm.path = weight, bias, "relu", "triton"
    for ghost in range(3):
        part = [t[ghost : ghost + 1].clone(memory_format=torch.channels_last) for t in (x, residual, dy)]
        y = norm(part[0].requires_grad_(), part[1])
        y.backward(part[2])
        assert torch.equal(y, first["output"][ghost : ghost + 1])
        assert torch.equal(part[0].grad, first["x"][ghost : ghost + 1])


def small_resnet():
    """A stem, a stage of three blocks, one with a shortcut of its own, and pooling."""
    shortcut = nn.Sequential(nn.Conv2d(16, 24, 1, 2), nn.BatchNorm2d(24))
    stage = nn.Sequential(BasicBlock(16, 24, 2, shortcut), BasicBlock(24, 24), BasicBlock(24, 24))
    stem = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, stage, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("ghosts", [1, 2])
@pytest.mark.parametrize(
    "build", [lambda: CifarNet((24, 32, 16), False), small_resnet], ids=["cifarnet", "resnet"]
)
def test_a_network_takes_the_kernels_and_is_as_exact_as_the_plain_path(build, ghosts, monkeypatch):
    torch.manual_seed(0)
    net = build().to(memory_format=torch.channels_last)
    use_ghost_norms(net)
    set_ghosts(net, ghosts)
    images = torch.randn(4, 3, 17, 17).contiguous(memory_format=torch.channels_last)
    results = {}
    for path in ("exact", "plain", "triton"):
        monkeypatch.setattr(GhostNorm, "path", "triton" if path == "triton" else "plain")
        dtype = torch.float64 if path == "exact" else torch.float32
        copied = copy.deepcopy(net).to(dtype)
        output = copied(images.to(dtype))
        output.square().sum().backward()
        with torch.no_grad():
            evaluated = copied.eval()(images.to(dtype))
        gradients = [p.grad for p in copied.parameters()]
        results[path] = [output.detach(), evaluated, *gradients, *copied.buffers()]
    assert not torch.equal(results["plain"][0], results["triton"][0])  # so it was another path
    for exact, plain, triton in zip(*results.values(), strict=True):
        scale = exact.abs().max() * 1e-6
        assert (triton - exact).abs().max() <= 3 * (plain - exact).abs().max() + scale


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=str)
def test_the_gradients_of_both_uses_are_added(activation, used):
    case = Case(2, 1, 24, 7, 5, activation)
    x, residual, dy, weight, bias, *_ = inputs(case, "cpu")
    norm = GhostBatchNorm2d(24)
    norm.weight.data, norm.bias.data, norm.ghosts, norm.activation, norm.path = (
        weight,
        bias,
        2,
        activation,
        "triton",
    )
    leaves = [x.requires_grad_(), residual.requires_grad_(), *norm.parameters()]
    once = norm(x, residual)
    # Halves and quarters, so that the sum has no rounding.
    shares = [dy * share for share, use in zip((0.5, 0.25), used, strict=True) if use]
    expected = torch.autograd.grad(once, leaves, sum(shares))
    outputs = norm(x, residual, True)
    assert torch.equal(outputs[0], once) and torch.equal(outputs[1], once)
    assert outputs[0].data_ptr() == outputs[1].data_ptr()
    found = torch.autograd.grad([y for y, use in zip(outputs, used, strict=True) if use], leaves, shares)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_value_that_is_not_finite_stays_visible():
    norm = GhostBatchNorm2d(4)
    norm.activation, norm.path = "relu", "triton"
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    x[0, 1, 0, 0] = torch.nan
    norm.get_buffer("running_mean")[2] = torch.nan
    norm.momentum = 1.0
    y = norm(x.requires_grad_())
    assert y[:, 1].isnan().all() and not y[:, [0, 2, 3]].isnan().any()
    assert norm.get_buffer("running_mean").isnan().tolist() == [
        False,
        True,
        False,
        False,
    ]  # momentum 1 forgets
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient[:, 1].isnan().all()


@pytest.mark.parametrize(
    "shape", [(2, 24, 9, 14), (1, 64, 8, 8), (3, 16, 1, 1), (1, 17, 2, 5), (2, 136, 17, 3)], ids=str
)
def test_max_pooling_has_the_librarys_values_and_winners(shape):
    x = torch.randn(shape).relu()  # many equal values: the first wins
    x[0, 0, 0, 0], x[0, 1] = torch.nan, -torch.inf
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    found, expected = fused_max_pool(x), F.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn(expected.shape)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_max_pooling_in_half_precision(dtype, monkeypatch):
    pool = nn.MaxPool2d(3, 2, 1)
    use_ghost_norms(pool)
    x = torch.randn(1, 16, 12, 10).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(1, 16, 6, 5).to(dtype)
    results = {}
    for path in ("plain", "triton"):
        monkeypatch.setattr(GhostNorm, "path", path)
        y = pool(x)
        results[path] = y, torch.autograd.grad(y, x, dy)[0]
    assert "FusedPool" in y.grad_fn.name()
    assert torch.equal(results["plain"][0], results["triton"][0])
    torch.testing.assert_close(results["triton"][1], results["plain"][1], rtol=2**-7, atol=2**-7)


def test_one_value_per_channel_is_refused_as_torch_does():
    norm = GhostBatchNorm2d(4)
    norm.path, norm.ghosts = "triton", 2
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(2, 4, 1, 1))
