"""A loss or gradient that is not finite: nothing is updated, and what helps to find the cause is kept."""

import json
import math

import pytest
import torch

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.async_saver import snapshot
from engines.config.detector import parse_config
from engines.runtime import fault_injection as faults
from engines.runtime.distributed import World
from engines.train.trainer import Trainer
from tests.support import differences, flags

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def build(tiny_shards, repo_root, tmp_path):
    def make(**changes):
        settings = {
            "model__backbone": "cifarnet_narrow",
            "model__stem": "imagenet",
            "train__steps": 8,
            **changes,
        }
        words = flags(data__shards=tiny_shards, **settings)
        config = parse_config(words, repo_root / "configs" / "quickstart.yaml")
        trainer = Trainer(
            config, ALONE, ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val"), run_dir=tmp_path
        )
        return trainer

    return make


@pytest.fixture
def fault(monkeypatch):
    def ask(text):
        monkeypatch.setattr(faults, "_faults", faults.parse_faults(text))

    return ask


def learnt(trainer):
    """What an update changes."""
    return snapshot(
        {
            "model": {k: v for k, v in trainer.model.state_dict().items() if "num_batches" not in k},
            "optimizer": trainer.optimizer.state_dict()["state"],
        }
    )


@pytest.mark.parametrize("what", ["nan", "inf", "nan_gradient"])
def test_it_stops_before_the_update_and_leaves_a_dump(build, fault, tmp_path, what):
    trainer = build(train__ema=0.9)
    trainer.train_step()
    before = learnt(trainer)["optimizer"], [p.detach().clone() for p in trainer.model.parameters()]
    fault(f"{what}@step.forward:step=1")
    with pytest.raises(
        UserError, match=r"step 2: the loss or its gradient is not finite; nothing was updated"
    ):
        trainer.train_step()
    after = learnt(trainer)["optimizer"], [p.detach() for p in trainer.model.parameters()]
    assert differences(list(before), list(after)) == []
    dump = json.loads((tmp_path / "nonfinite.json").read_text())
    assert dump["step"] == 2 and dump["sample_ids"] == trainer.order.step_ids(1).tolist()
    named = dict(trainer.model.named_parameters())
    assert dump["weight_norms"].keys() == named.keys() == dump["gradient_norms"].keys()
    name = "backbone.conv1.weight"
    assert dump["weight_norms"][name] == pytest.approx(named[name].norm().item(), rel=1e-5)
    assert dump["gradient_norms"][name] == "nan"


def test_skipping_leaves_no_trace_but_the_count(build, fault):
    trainer = build(train__nonfinite="skip")
    trainer.train_step()
    trainer.pop_metrics()
    before = learnt(trainer)
    fault("nan@step.forward:step=1")
    trainer.train_step()
    assert differences(before, learnt(trainer)) == []
    metrics = trainer.pop_metrics()
    assert metrics["skipped"] == 1 and metrics["grad_norm"] is None
    assert json.dumps(metrics, allow_nan=False)
    trainer.train_step()
    assert differences(before, learnt(trainer)) != []
    metrics = trainer.pop_metrics()
    assert metrics["skipped"] == 1 and math.isfinite(metrics["loss"])


def test_a_skipped_first_step_leaves_no_garbage_in_the_momentum(build, fault):
    trainer = build(train__nonfinite="skip")
    fault("nan@step.forward:step=0")
    trainer.train_step()
    buffers = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert len(buffers) == len(list(trainer.model.parameters()))
    assert all(buffer.eq(0).all() for buffer in buffers)


def test_a_run_that_skips_resumes_exactly(build, fault):
    fault("nan@step.forward:step=1; inf@step.forward:step=4")
    whole, states = build(train__nonfinite="skip"), {}
    while whole.step < 8:
        whole.train_step()
        whole.pop_metrics()
        states[whole.step] = snapshot(whole.state())
    assert states[8]["skipped"] == 2
    for step in (1, 2, 4):
        again = build(train__nonfinite="skip")
        again.load_state(states[step])
        while again.step < 8:
            again.train_step()
            again.pop_metrics()
        assert differences(states[8], snapshot(again.state())) == []


@pytest.mark.parametrize("checks_every_step", [True, False])
def test_more_than_the_cap_stop_the_run_with_the_weights_of_the_last_good_step(
    build, fault, checks_every_step
):
    fault(";".join(f"nan@step.forward:step={step}" for step in (1, 2, 3)))
    trainer = build(train__nonfinite="skip", train__nonfinite_cap=2)
    trainer.checks_every_step = checks_every_step
    trainer.train_step()
    before = learnt(trainer)
    with pytest.raises(UserError, match=r"and 3 steps were not, more than train\.nonfinite_cap 2"):
        for _ in range(6):
            trainer.train_step()
        trainer.pop_metrics()
    assert differences(before, learnt(trainer)) == []


def test_an_exploding_rate_is_stopped(build):
    trainer = build(train__steps=40, optim__lr=1e12, optim__warmup=0)
    with pytest.raises(UserError, match="is not finite; nothing was updated since"):
        for _ in range(40):
            trainer.train_step()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_fp16_skips_an_overflow_by_itself_until_its_scale_is_at_its_minimum(build, fault):
    trainer = build(train__precision="fp16")
    trainer.train_step()
    scale = trainer.scaler.get_scale()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    fault(";".join(f"nan_gradient@step.forward:step={step}" for step in (1, 2)))
    trainer.train_step()  # an overflow, for all it knows
    assert trainer.scaler.get_scale() == scale / 2
    assert differences(before, [p.detach() for p in trainer.model.parameters()]) == []
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1.0})
    with pytest.raises(UserError, match="step 3: the loss or its gradient is not finite"):
        trainer.train_step()
    assert differences(before, [p.detach() for p in trainer.model.parameters()]) == []


def test_fp16_where_the_host_looks_later_nothing_is_updated_after_a_bad_step(build, fault):
    trainer = build(train__precision="fp16")
    trainer.checks_every_step = False
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    fault("nan@step.forward:step=1")
    for _ in range(3):
        trainer.train_step()
    assert differences(before, [p.detach() for p in trainer.model.parameters()]) == []
    with pytest.raises(UserError, match="step 2: the loss"):
        trainer.pop_metrics()


def test_the_step_has_no_look_at_the_device_where_it_may_not_wait(build, monkeypatch):
    trainer = build(train__nonfinite="skip")
    trainer.checks_every_step = False
    looked: list[int] = []
    item = torch.Tensor.item

    def counted(tensor):
        looked.append(1)
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", counted)
    judge = trainer.nonfinite.update_mask

    def watched(*words):
        before = len(looked)
        masked = judge(*words)
        assert len(looked) == before
        return masked

    monkeypatch.setattr(trainer.nonfinite, "update_mask", watched)
    trainer.train_step()
    assert isinstance(trainer.nonfinite.skipped, int) and looked
