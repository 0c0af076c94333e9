"""What captured passes are made of, as far as a CPU can show it; tests/gpu captures them."""

import pytest
import torch
from torch import nn

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.train.cuda_graph import FlatGradients, forbidden
from engines.train.trainer import Trainer
from tests.support import flags

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


def test_gradients_are_views_of_one_tensor_in_the_parameters_own_strides():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 7))
    model = model.to(memory_format=torch.channels_last)
    model[2].bias.requires_grad_(False)
    image = torch.randn(2, 3, 6, 6)
    model(image).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    gradients = FlatGradients(list(model.parameters()))
    for _ in range(2):
        gradients.flat.zero_()
        for part in image.split(1):
            model(part).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name not in expected:
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            assert parameter.grad.untyped_storage().data_ptr() == gradients.flat.untyped_storage().data_ptr()
            torch.testing.assert_close(parameter.grad, expected[name])
    total = sum(value.square().sum() for value in expected.values())
    torch.testing.assert_close(gradients.flat.square().sum(), total)  # nothing between the views


@pytest.fixture
def build(tiny_shards, repo_root):
    def make(**changes):
        words = flags(data__shards=tiny_shards, **changes)
        config = parse_config(words, repo_root / "configs" / "quickstart.yaml")
        return Trainer(config, ALONE, ShardSet(tiny_shards, "train"), None)

    return make


def test_a_pass_computes_the_same_from_inputs_that_keep_their_memory(build):
    """As a replayed graph does: step after step by the same tensors."""
    options = {
        "mix__mixup": 0.4,
        "model__head_hidden": 8,
        "model__head_dropout": 0.5,
        "train__pass_images": 8,
    }
    plain, held = build(**options), build(**options)
    held.prepare()
    fixed = {}
    step = held.runner.step_of_pass
    inputs_of = step.inputs

    def inputs(batch, **drawn):
        fresh = inputs_of(batch, **drawn)
        count = fresh.numbers.shape[1]
        if count not in fixed:
            fixed[count] = step.blank_inputs(count)
        fixed[count].copy_(fresh)
        return fixed[count]

    step.inputs = inputs
    for _ in range(4):
        plain.train_step()
        held.train_step()
        assert plain.pop_metrics() == held.pop_metrics()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.model.parameters(), held.model.parameters(), strict=True)
    )


def test_a_pass_that_cuts_its_images_out_of_a_held_split_is_the_same(build):
    options = {"data__resident": True, "data__crop": "random", "data__pad": 2, "data__augment__erase": 0.5}
    given, cut = build(**options), build(**options)
    cut.prepare()
    batches = cut.data.held_batches(0, 3, cut.runner.micro_batches)
    shape = cut.runner.step_of_pass.blank_inputs(1, columns=cut.data.gatherer().columns).columns.shape
    for _ in range(3):
        given.train_step()
        cut.use_batches(batches)
        cut.train_step()
        assert given.pop_metrics() == cut.pop_metrics()
    assert tuple(shape) == (10, 4)
    assert next(batches, None) is None


def test_a_held_split_that_is_resampled_cannot_be_cut_out(build):
    assert build(data__resident=True, data__crop="random_resized", data__pad=0).data.gatherer() is None
    assert build().data.gatherer() is None


def test_a_graph_that_is_asked_for_and_cannot_be_is_an_error(build):
    with pytest.raises(UserError, match=r"train\.graph is on, but there is no GPU; set it to auto or off"):
        build(train__graph="on").train_step()


@pytest.mark.parametrize(
    ("changes", "device", "obstacles", "reason"),
    [
        ({}, "cpu", [], "there is no GPU"),
        ({}, "cuda", [], ""),
        ({"train__graph": "off"}, "cuda", [], "train.graph is off"),
        ({"train__compile": True}, "cuda", [], "train.compile is set"),
        ({}, "cuda", ["backbone.drop"], "backbone.drop draws from torch's generator"),
    ],
)
def test_what_forbids_a_graph_is_named(repo_root, changes, device, obstacles, reason):
    config = parse_config(flags(**changes), repo_root / "configs" / "quickstart.yaml")
    world = World(rank=0, size=1, local_rank=0, device=torch.device(device), distributed=False)
    assert forbidden(config, world, obstacles) == reason
