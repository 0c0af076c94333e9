"""Dropout and stochastic depth that follow from keys: per micro-batch, whatever a pass holds."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn
from torchvision.ops import StochasticDepth

from models.detector.backbones.registry import build_backbone
from models.detector.keyed_dropout import keyed_uniform, use_keyed_dropout


def test_numbers_are_uniform_and_differ_by_key_layer_and_place():
    keys = torch.arange(40)
    numbers = keyed_uniform(keys, 3, 500).numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert kstest(numbers.flatten(), "uniform").pvalue > 0.01
    assert len(np.unique(numbers)) > 0.99 * numbers.size
    others = keyed_uniform(keys, 4, 500).numpy()
    for other in (others, np.roll(numbers, 1, 0), np.roll(numbers, 1, 1)):
        assert abs(np.corrcoef(numbers.flatten(), other.flatten())[0, 1]) < 0.03


def test_the_hash_is_splitmix64s():
    def finalized(value):
        mask = 2**64 - 1
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    key, layer = -12345, 7
    state = finalized((key + (layer + 1) * 0x94D049BB133111EB) % 2**64)
    expected = [finalized((state + place * 0x9E3779B97F4A7C15) % 2**64) >> 40 for place in range(1, 6)]
    assert (keyed_uniform(torch.tensor([key]), layer, 5)[0] * 2**24).long().tolist() == expected


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), StochasticDepth(0.4, "row")], ids=["dropout", "depth"])
def test_a_pass_drops_in_each_micro_batch_what_it_drops_alone(layer):
    model = nn.Sequential(layer)
    keys, others = use_keyed_dropout(model)
    assert others == []
    x = torch.rand(12, 5, 4, 4) + 1
    keys.keys = torch.tensor([11, 5, 900])
    together = model(x)
    for place in range(3):
        keys.keys = torch.tensor([[11, 5, 900][place]])
        part = slice(4 * place, 4 * place + 4)
        assert torch.equal(model(x[part]), together[part])
    kept = together != 0
    torch.testing.assert_close(together, torch.where(kept, x / 0.6, 0))
    assert 0.3 < kept.float().mean() < 0.9
    model.eval()
    assert torch.equal(model(x), x)


def test_nothing_but_the_keys_decides_and_gradients_flow_through_what_is_kept():
    model = nn.Sequential(nn.Dropout(0.5))
    keys, _ = use_keyed_dropout(model)
    x = torch.ones(8, 100, requires_grad=True)
    first = model(x)
    torch.manual_seed(99)
    assert torch.equal(model(x), first)
    first.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, first.detach())
    keys.keys = torch.tensor([1])
    assert not torch.equal(model(x), first)


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "swin_t", "timm:convnext_atto", "timm:vit_tiny_patch16_224"]
)
def test_every_backbones_stochastic_depth_follows_the_keys(name):
    net, _ = build_backbone(name, stochastic_depth=0.5, image_size=224)
    names = list(net.state_dict())
    keys, others = use_keyed_dropout(net)
    assert others == [] and list(net.state_dict()) == names
    image = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        net.train()
        first = net(image)
        torch.manual_seed(5)
        assert torch.equal(net(image), first)
        keys.keys = torch.tensor([3])
        assert not torch.equal(net(image), first)


def test_layers_that_drop_in_another_way_are_named():
    model = nn.ModuleDict({"a": nn.Dropout2d(0.1), "b": nn.Dropout2d(0.0), "attn_drop": nn.Dropout(0.1)})
    assert use_keyed_dropout(model)[1] == ["a", "attn_drop"]
