"""Training on splits held in memory is training as without; and a step waits for no device."""

import copy
from typing import Any, NoReturn

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.async_saver import snapshot
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.train.resume import check_same_run, weights_file
from engines.train.trainer import Trainer
from tests.support import differences, flags

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def build(tiny_shards, repo_root):
    def make(**changes):
        settings = {
            "model__backbone": "cifarnet_narrow",
            "model__stem": "imagenet",
            "train__steps": 6,
            **changes,
        }
        config = parse_config(
            flags(data__shards=tiny_shards, **settings), repo_root / "configs" / "quickstart.yaml"
        )
        return Trainer(config, ALONE, ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val"))

    return make


def trained(trainer, until):
    """Metrics of every step, and of a validation after it."""
    found = []
    while trainer.step < until:
        trainer.train_step()
        found.append((trainer.pop_metrics(), trainer.validate().metrics))
    return found


def state(trainer):
    return snapshot(trainer.state())


@pytest.mark.parametrize(
    "changes", [{}, {"model__whiten": True, "data__sampling": "balanced", "train__ema": 0.9}]
)
def test_losses_errors_and_weights_are_those_without(build, changes):
    pair = []
    for held in (False, True):
        trainer = build(data__resident=held, **changes)
        assert (trainer.data.train_in_memory is not None) == (trainer.data.val_in_memory is not None) == held
        pair.append((trained(trainer, 6), state(trainer)))
    (metrics, weights), (held_metrics, held_weights) = pair
    assert metrics == held_metrics
    assert differences(weights, held_weights) == []


def test_a_run_on_held_data_resumes_exactly_and_also_without(build):
    whole = build(data__resident=True)
    trained(whole, 4)
    kept = state(whole)
    trained(whole, 6)
    for held in (True, False):
        again = build(data__resident=held)
        again.load_state(copy.deepcopy(kept))  # as from a file: training goes on in these tensors
        trained(again, 6)
        assert differences(state(whole), state(again)) == []


def test_holding_may_change_in_a_continuation_only_where_it_changes_nothing(build):
    for changes, same in (({}, True), ({"data__crop": "random_resized", "data__pad": 0}, False)):
        before, after = (build(data__resident=held, **changes) for held in (False, True))
        stored = {**before.state(), **weights_file(before, before.model.state_dict())}
        if same:
            check_same_run(after.config, ALONE, stored, after.train_set)
        else:
            with pytest.raises(
                UserError, match=r"data\.resident is True, but this run was started with False"
            ):
                check_same_run(after.config, ALONE, stored, after.train_set)


class NoWaiting(TorchDispatchMode):
    """Fails where an operation would make the host wait for a GPU, whoever calls it."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique2",
        "_to_cpu",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        masks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)
        if name in self.WAITING or masks:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


READING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


@pytest.mark.parametrize(
    "changes",
    [
        {"data__resident": True, "train__ema": 0.9, "optim__clip": 1.0},
        {"data__resident": True, "train__nonfinite": "skip", "data__augment__erase": 0.5, "mix__cutmix": 1.0},
        {"data__resident": True, "data__crop": "random_resized", "data__pad": 0, "optim__name": "adamw"},
        {"train__precision": "fp16", "mix__mixup": 0.2, "loss__class_weights": "inverse"},
        {"train__precision": "bf16", "train__frozen_epochs": 0.4, "data__sampling": "balanced"},
    ],
    ids=["held", "skip", "resampled", "fp16", "frozen"],
)
def test_between_logs_a_step_never_reads_a_tensor_of_the_device(build, monkeypatch, changes):
    trainer = build(**changes)
    trainer.checks_every_step = False  # as on a GPU
    thaws = trainer.schedule.frozen_steps
    found: list[str] = []

    def forbid(name: str) -> None:
        def read(tensor: torch.Tensor, *words: object, **named: object) -> NoReturn:
            found.append(name)
            raise AssertionError(f"Tensor.{name} waits for the device")

        monkeypatch.setattr(torch.Tensor, name, read)

    original = {name: getattr(torch.Tensor, name) for name in READING}
    for step in range(5):
        # Opening the loader and changing what learns may look; each happens once.
        if step not in (0, thaws):
            for name in READING:
                forbid(name)
            with NoWaiting():
                trainer.train_step()
        else:
            trainer.train_step()
        for name, function in original.items():
            monkeypatch.setattr(torch.Tensor, name, function)
    assert found == []
    assert trainer.pop_metrics()["loss"] > 0 and trainer.step == 5


def test_the_probe_finds_what_waits(build):
    trainer = build(data__resident=True)
    assert trainer.checks_every_step  # a CPU's step looks
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoWaiting():
        trainer.train_step()
    with NoWaiting():
        torch.ones(3)[torch.tensor([0, 2])] += 1
        for wait in (
            lambda t: t[t > 0],
            lambda t: bool(t.sum()),
            torch.unique,
            torch.nonzero,
        ):
            with pytest.raises(AssertionError, match="waits for the device"):
                wait(torch.ones(3))
