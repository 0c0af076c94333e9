"""data.generators: photographs and the named generators only, in both splits, and exactly resumed."""

import copy

import numpy as np
import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading.training_order import TrainingOrder
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.config.values import changed_keys, to_dict
from engines.runtime.distributed import World
from engines.train.open_data import open_sets
from engines.train.trainer import Trainer
from tests.support import flags

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def configure(tiny_shards, repo_root):
    def make(**changes):
        words = flags(data__shards=tiny_shards, train__steps=6, **changes)
        return parse_config(words, repo_root / "configs" / "quickstart.yaml")

    return make


def test_both_splits_have_photographs_and_the_named_ones_only(configure, tiny_shards):
    train, val = open_sets(configure(data__generators="[big_gan]"))
    whole = ShardSet(tiny_shards, "train")
    number = whole.labels.generators.index("big_gan")
    assert number > 1  # so that it is no accident of the first two
    wanted = np.isin(whole.rows["generator"], [0, number])
    assert 0 < wanted.sum() < len(whole) and len(train) == wanted.sum() == train.shard_sizes.sum()
    assert set(train.rows["generator"].tolist()) == {0, number}
    assert val is not None and set(val.rows["generator"].tolist()) <= {0, number}
    # The label space stays, so that all models share it; ids are rows of the selection.
    assert train.labels == whole.labels
    rows = np.flatnonzero(wanted)
    assert np.array_equal(train.read(3), whole.read(int(rows[3])))


def test_naming_nature_or_nothing_changes_nothing(tiny_shards):
    def chosen(*names):
        return ShardSet(tiny_shards, "train", generators=names).rows

    whole = ShardSet(tiny_shards, "train").rows
    assert np.array_equal(chosen("nature", "big_gan"), chosen("big_gan"))
    assert set(chosen("nature")["generator"].tolist()) == {0}
    assert np.array_equal(chosen(), whole)


def test_an_unknown_name_is_one_line(tiny_shards):
    with pytest.raises(
        UserError, match=r"no generator 'flux'; there are nature, .*\(data\.generators\)"
    ) as caught:
        ShardSet(tiny_shards, "train", generators=["flux"])
    assert "\n" not in str(caught.value)


def test_an_epoch_is_of_the_selection(configure):
    config = configure(data__generators="[big_gan]")
    train, _ = open_sets(config)
    order = TrainingOrder(train, config.data, 0, 16)
    assert order.steps_per_epoch == len(train) // 16
    ids = np.concatenate([order.step_ids(step) for step in range(order.steps_per_epoch)])
    assert len(set(ids.tolist())) == len(ids) and ids.max() < len(train)


def test_a_run_resumes_bit_for_bit_and_the_key_may_not_change(configure):
    config = configure(data__generators="[big_gan]", data__sampling="balanced")
    undisturbed, resumed = (Trainer(config, ALONE, *open_sets(config)) for _ in range(2))

    def state(trainer):
        return copy.deepcopy(trainer.state())

    for step in range(6):
        if step == 3:
            resumed.load_state(state(undisturbed))
        undisturbed.train_step()
        if step >= 3:
            resumed.train_step()
    ours, theirs = (state(trainer)["model"] for trainer in (undisturbed, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    changes = changed_keys(to_dict(config), configure(data__generators="[adm]", data__sampling="balanced"))
    assert changes == [("data.generators", ["big_gan"], ["adm"])]
