"""A checkpoint of the first version loads for ever, and a run continues from it.

tests/assets/checkpoint_v1.pt was written by the code of 2026-11-24, before steps could be
skipped: 7 of 10 steps of a tiny network on the shards of the fixture `tiny_shards`.
"""

from pathlib import Path

import pytest

from dataio.shards.shard_set import ShardSet
from engines.checkpoint.files import load, save
from engines.config.detector import from_dict
from engines.runtime.distributed import World
from engines.train.resume import check_same_run
from engines.train.schedule import data_fingerprint
from engines.train.trainer import Trainer
from models.detector.backbones.cifarnet import CIFARNETS, build_cifarnet
from models.detector.backbones.registry import BACKBONES, Backbone
from tests.engines.train.test_nonfinite import ALONE

V1 = Path(__file__).parents[2] / "assets" / "checkpoint_v1.pt"
# What the run that wrote it went on to see.
LOSSES = [3.991380, 4.332438, 4.376790]
VALIDATION = 4.053827


@pytest.fixture
def tiny_network(monkeypatch):
    monkeypatch.setitem(CIFARNETS, "cifarnet_tiny", ((8, 8, 8), True))
    monkeypatch.setitem(BACKBONES, "cifarnet_tiny", Backbone(build_cifarnet))


def test_it_is_small_and_of_version_1():
    assert V1.stat().st_size < 300_000
    state = load(V1)
    assert (state["version"], state["step"]) == (1, 7)
    assert "skipped" not in state and "background" not in state["config"]["checkpoint"]


def test_a_run_continues_from_it(tiny_network, tiny_shards, tmp_path):
    train, val = ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val")
    state = load(V1)
    # The shards were drawn elsewhere; other versions of Pillow write other bytes.
    state["data"] = data_fingerprint(train)
    save(tmp_path / "v1.pt", state)
    state = load(tmp_path / "v1.pt")
    config = from_dict(state["config"])
    world: World = ALONE
    check_same_run(config, world, state, train)
    trainer = Trainer(config, world, train, val)
    trainer.load_state(state)
    losses = []
    while trainer.step < trainer.schedule.total_steps:
        trainer.train_step()
        losses.append(trainer.pop_metrics()["loss"])
    assert losses == pytest.approx(LOSSES, rel=1e-2)
    assert trainer.validate().metrics["loss"] == pytest.approx(VALIDATION, rel=1e-2)
