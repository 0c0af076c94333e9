"""Every training option changes what it should, and a run with it resumes bit for bit."""

import copy

import pytest
import torch
from torch import nn

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.files import cpu_state
from engines.config.detector import LossConfig, parse_config
from engines.runtime.distributed import World
from engines.train.optim import learning_rate
from engines.train.trainer import Trainer
from tests.support import flags

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def build(tiny_shards, repo_root):
    def make(val=True, **changes):
        config = parse_config(
            flags(data__shards=tiny_shards, **changes), repo_root / "configs" / "quickstart.yaml"
        )
        sets = ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val") if val else None
        return Trainer(config, ALONE, *sets)

    return make


def state_of(trainer):
    return copy.deepcopy(trainer.state())


def unequal(a, b, name=""):
    """Names of the leaves that are not bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        return [leaf for key in a for leaf in unequal(a[key], b[key], f"{name}.{key}")]
    return [] if a == b else [name]


COMMON: dict[str, object] = {"train__steps": 8, "train__micro_batch": 8, "optim__weight_decay": 0.01}
CONVNEXT: dict[str, object] = {
    "model__backbone": "convnext_tiny",
    "model__stem": "imagenet",
    "model__whiten": "false",
    "data__size": 32,
    "train__steps": 4,
    "optim__lr": 1e-3,
}
# What a run with the option is compared to, where that is not the plain one.
WITHOUT: dict[str, dict[str, object]] = {
    "stochastic_depth": CONVNEXT,
    "dropout_in_hidden_heads": {"model__head_hidden": 8},
}
OPTIONS: dict[str, dict[str, object]] = {
    "linear": {"optim__schedule": "linear"},
    "plateau": {"optim__schedule": "plateau", "optim__plateau_patience": 0, "optim__plateau_threshold": 0.9},
    "early_stop": {"train__early_stop": 9, "train__early_stop_threshold": 0.5},
    "adamw": {"optim__name": "adamw", "optim__lr": 1e-3},
    "ema": {"train__ema": 0.9},
    "augmentation": {
        "data__augment__rand_augment": 1,
        "data__augment__jpeg": 0.5,
        "data__augment__webp": 0.3,
        "data__augment__erase": 0.5,
    },
    "stochastic_depth": {**CONVNEXT, "model__stochastic_depth": 0.5},
    "balanced": {"data__sampling": "balanced"},
    "square_root": {"data__sampling": "square_root"},
    "dropout_in_hidden_heads": {"model__head_hidden": 8, "model__head_dropout": 0.5},
    "class_weights": {"loss__class_weights": "inverse"},
    "mixup": {"mix__mixup": 0.4},
    "cutmix": {"mix__cutmix": 1.0},
    "both_mixes_sometimes": {"mix__mixup": 0.4, "mix__cutmix": 1.0, "mix__probability": 0.5},
    "frozen_then_all": {"train__frozen_epochs": 0.5, "optim__frozen_lr": 0.01},
    "frozen": {"train__frozen_epochs": -1},
    "norms_and_no_nesterov": {"optim__decay_norms": "true", "optim__nesterov": "false"},
    "frozen_stem": {"model__freeze_stem": "true"},
    "hidden_heads": {"model__head_hidden": 8},
}


# Each takes about ten seconds on two cores.
SLOW = {
    "ema",
    "mixup",
    "augmentation",
    "balanced",
    "plateau",
    "early_stop",
    "stochastic_depth",
    "frozen_stem",
}
# These differ little from others.
LONG = {
    "linear",
    "adamw",
    "class_weights",
    "cutmix",
    "square_root",
    "dropout_in_hidden_heads",
    "both_mixes_sometimes",
    "frozen",
    "hidden_heads",
    "norms_and_no_nesterov",
}


def _marks(name):
    return pytest.mark.slow if name in SLOW else pytest.mark.long if name in LONG else ()


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in OPTIONS])
def test_a_run_with_the_option_differs_and_resumes_bit_for_bit(build, name):
    options = {**COMMON, **OPTIONS[name]}
    trainer, states = build(**options), {}
    steps = trainer.schedule.total_steps
    while trainer.step < steps:
        trainer.train_step()
        if trainer.step % 2 == 0:
            trainer.update_selection(trainer.validate().metrics["loss"])
        states[trainer.step] = state_of(trainer)
    for step in (1, 2, 3, 4, 5, 7)[: steps - 2]:
        again = build(**options)
        again.load_state(copy.deepcopy(states[step]))
        while again.step < steps:
            again.train_step()
            if again.step % 2 == 0:
                again.update_selection(again.validate().metrics["loss"])
        assert unequal(states[steps], state_of(again)) == [], step
    plain = build(**{**COMMON, **WITHOUT.get(name, {})})
    while plain.step < steps:
        plain.train_step()
    if name == "early_stop":  # watches only
        assert (
            states[steps]["patience"]["waited"] > 0 and states[steps]["patience"] != plain.state()["patience"]
        )
    elif name == "ema":  # averages beside the training, which goes on as it would
        assert unequal(cpu_state(plain.model), states[steps]["model"]) == []
        assert unequal(states[steps]["ema"], states[steps]["model"]) != []
    else:
        assert cpu_state(plain.model).keys() != states[steps]["model"].keys() or unequal(
            cpu_state(plain.model), states[steps]["model"]
        )


def test_the_average_is_the_written_out_sum_and_is_what_is_judged(build):
    trainer = build(train__ema=0.5)
    average = {n: t.double() for n, t in cpu_state(trainer.model).items() if t.is_floating_point()}
    for step in (1, 2, 3, 4):
        trainer.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in cpu_state(trainer.model).items():
            if name in average:
                average[name] = decay * average[name] + (1 - decay) * value.double()
    found = cpu_state(trainer.eval_model)
    for name, value in average.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    judged, raw = trainer.validate().metrics, build().validate().metrics
    assert trainer.eval_model is not trainer.model and judged != raw


def test_plateau_cuts_as_torchs_scheduler_does(build):
    trainer = build(optim__schedule="plateau", optim__warmup=0, optim__lr=0.1, optim__plateau_patience=2)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, threshold=0.01)
    scores = [0.9, 0.8, 0.799, 0.8, 0.81, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.69, 0.5, 0.5, 0.5, 0.5, 0.5]
    said = []
    for score in scores:
        said.append(trainer.update_selection(score).rate_cut)
        oracle.step(score)
        rate = learning_rate(trainer.config.optim, 0, 10, cuts=trainer.selection.cuts)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
    assert sum(said) == trainer.selection.cuts == 4 and said[4]


def test_early_stopping_waits_for_its_epochs_and_then_for_an_improvement(build):
    trainer = build(train__early_stop=2, train__early_stop_after=1.0, train__early_stop_threshold=0.1)
    per_epoch = trainer.schedule.steps_per_epoch
    seen = []
    for epoch, score in enumerate([0.1, 0.5, 0.49, 0.3, 0.29, 0.28], start=1):
        trainer.step = epoch * per_epoch
        trainer.update_selection(score)
        seen.append(trainer.selection.early_stopped)
    # The first is not looked at; 0.49 is no tenth better than 0.5, 0.3 is; then two in a row are not.
    assert seen == [False, False, False, False, False, True]


@pytest.mark.parametrize("option", [{"optim__schedule": "plateau"}, {"train__early_stop": 3}])
def test_what_watches_validation_needs_one(build, option):
    with pytest.raises(UserError, match=r"watches validation, and .* has no val split"):
        build(val=False, **option)


def test_frozen_epochs_leave_the_backbone_alone_and_then_do_not(build):
    trainer = build(
        train__steps=6, train__frozen_epochs=3 / 7, optim__frozen_lr=0.03, optim__warmup=0, optim__lr=0.002
    )
    assert trainer.schedule.frozen_steps == 3
    start, rates = cpu_state(trainer.model), []
    for _ in range(3):
        trainer.train_step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    now = cpu_state(trainer.model)
    assert unequal({k: v for k, v in start.items() if k.startswith("backbone.")}, backbone(now)) == []
    assert unequal(start, now) != [] and rates == [0.03] * 3
    trainer.train_step()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.002)
    changed = unequal(backbone(now), backbone(cpu_state(trainer.model)))
    assert len([name for name in changed if name.endswith("weight")]) == 40
    assert any("running_mean" in name for name in changed)


def backbone(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def test_a_frozen_stem_stays_and_costs_less(build):
    trainer, plain = build(model__freeze_stem="true"), build()
    start = trainer.model.backbone.conv1.weight.clone()
    trainer.train_step()
    assert torch.equal(start, trainer.model.backbone.conv1.weight)
    assert trainer.flops_per_image < plain.flops_per_image
    with pytest.raises(UserError, match=r"model\.freeze_stem needs a backbone whose first layer"):
        build(model__freeze_stem="true", model__backbone="swin_t", model__stem="imagenet")


def test_class_weights_are_inverse_to_the_counts_and_weigh_the_loss(build, tiny_shards):
    trainer = build(loss__class_weights="inverse", loss__object=0)
    rows = ShardSet(tiny_shards, "train").rows
    counts = torch.bincount(torch.from_numpy(rows["generator"].astype("int64")))
    weights = trainer.runner.step_of_pass.class_weights
    torch.testing.assert_close(weights * counts, torch.full((5,), float(len(rows) / 5)))
    root = build(loss__class_weights="inverse_sqrt").runner.step_of_pass.class_weights
    torch.testing.assert_close((root / root[0]) ** 2, weights / weights[0])
    assert (root * counts).sum().item() == pytest.approx(len(rows))


@pytest.mark.parametrize("setting", ["inverse", "inverse_sqrt", "none"])
def test_class_weights_parse(setting):
    assert LossConfig(class_weights=setting).class_weights == setting
