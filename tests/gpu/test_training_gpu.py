"""Training on a GPU: it follows the CPU's, a captured graph follows eager passes, passes of any size agree."""

import copy
from typing import Any

import pytest
import torch

from tests.support import differences
from tests.trainers import OPTIONS, STEADY, build_trainer, share_pixels, train_losses

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run `pytest tests/gpu` on a machine with one"
)
STEPS = 6
# Batch norm with mixing and dropout; layer norm with stochastic depth.
RANDOM: dict[str, dict[str, Any]] = {
    "mixing and dropout": {
        "mix__mixup": 0.4,
        "mix__cutmix": 1.0,
        "model__head_hidden": 8,
        "model__head_dropout": 0.5,
        "train__ema": 0.9,
    },
    "stochastic depth": {
        "model__backbone": "convnext_tiny",
        "model__stem": "imagenet",
        "model__whiten": False,
        "data__size": 32,
        "model__stochastic_depth": 0.5,
        "mix__mixup": 0.4,
    },
}
# Passes of two ghost batches and one of one.
UNEVEN = {**STEADY, "train__global_batch": 48, "train__pass_images": 32}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_in_fp32_follows_the_cpu(tiny_shards, name):
    changes = {**STEADY, **OPTIONS[name]}
    gpu, cpu = (build_trainer(tiny_shards, device, **changes) for device in ("cuda:0", "cpu"))
    share_pixels([cpu, gpu], 8)
    assert train_losses(gpu, 8) == pytest.approx(train_losses(cpu, 8), rel=1e-3)


@pytest.mark.parametrize("name", RANDOM)
def test_every_step_of_a_graph_equals_the_eager_step(tiny_shards, name):
    changes = {**UNEVEN, **RANDOM[name]}
    eager = build_trainer(tiny_shards, "cuda:0", **changes, train__graph="off")
    captured = build_trainer(tiny_shards, "cuda:0", **changes, train__graph="on")
    share_pixels([eager, captured], STEPS)
    for _ in range(STEPS):
        assert train_losses(captured, 1) == pytest.approx(train_losses(eager, 1), rel=1e-4)
    assert captured.runner.eager_reason == "" and eager.runner.eager_reason
    _assert_same_weights(captured, eager)


def test_a_graph_cuts_a_held_split_as_the_loader_does(tiny_shards):
    changes = {**UNEVEN, "data__resident": True, "data__augment__erase": 0.5, "mix__mixup": 0.4}
    eager = build_trainer(tiny_shards, "cuda:0", **changes, train__graph="off")
    captured = build_trainer(tiny_shards, "cuda:0", **changes, train__graph="on")
    for _ in range(STEPS):
        assert train_losses(captured, 1) == pytest.approx(train_losses(eager, 1), rel=1e-4)
    assert captured.runner.cuts_out and not eager.runner.cuts_out
    _assert_same_weights(captured, eager)


@pytest.mark.parametrize(("first", "second"), [("on", "off"), ("off", "on"), ("on", "on")])
def test_a_resumed_run_follows_with_a_graph_or_without(tiny_shards, first, second):
    changes = {**UNEVEN, **RANDOM["mixing and dropout"]}
    whole = build_trainer(tiny_shards, "cuda:0", **changes, train__graph=first)
    train_losses(whole, 3)
    state = copy.deepcopy(whole.state())
    resumed = build_trainer(tiny_shards, "cuda:0", **changes, train__graph=second)
    resumed.load_state(state)
    share_pixels([whole, resumed], 3)
    assert train_losses(resumed, 3) == pytest.approx(train_losses(whole, 3), rel=1e-4)
    _assert_same_weights(resumed, whole)


def test_a_graph_leaves_the_first_step_as_it_was(tiny_shards):
    """Its warm-up and capture restore weights, optimizer, statistics and sums."""
    trainer = build_trainer(tiny_shards, "cuda:0", **UNEVEN, train__graph="on")
    before = copy.deepcopy(trainer.state())
    trainer.prepare()
    after = trainer.state()
    assert trainer.runner.eager_reason == ""
    assert all(
        differences(before[part], after[part], part) == [] for part in ("model", "optimizer", "meters")
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_do_not_depend_on_what_a_pass_holds(more_shards, precision):
    found = []
    for images in (32, 64, 128):
        changes = {**STEADY, "train__global_batch": 128, "train__micro_batch": 32}
        changes |= {"train__precision": precision, "train__pass_images": images}
        trainer = build_trainer(more_shards, "cuda:0", **changes)
        found.append(train_losses(trainer, 4))
        assert [len(each) * 32 for each in trainer.runner.passes] == [images] * (128 // images)
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    assert found[1] == pytest.approx(found[0], rel=tolerance)
    assert found[2] == pytest.approx(found[0], rel=tolerance)


def _assert_same_weights(found, expected):
    weights = expected.model.state_dict()
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5, msg=f"{name} differs")
