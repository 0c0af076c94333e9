"""Balanced sampling: shares, rotation, and ids that only the position decides."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.loading.balanced_order import BalancedOrder, class_counts
from dataio.loading.config import DataConfig
from dataio.loading.training_order import TrainingOrder
from dataio.shards.shard_set import ShardSet


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return ShardSet(tiny_shards, "train")


def order(shards, rule="balanced", seed=0):
    return BalancedOrder(shards, seed, 2, rule)


def test_each_class_is_drawn_equally_often(shards):
    counts = class_counts(shards)
    assert counts.max() > 3 * counts.min() > 0
    drawn = shards.rows["generator"][order(shards).ids(0, 10 * len(counts))]
    assert Counter(drawn.tolist()) == dict.fromkeys(range(len(counts)), 10)


def test_square_root_lies_between(shards):
    counts = class_counts(shards)
    drawn = np.bincount(shards.rows["generator"][order(shards, "square_root").ids(0, 256 * 20)])
    expected = np.sqrt(counts) / np.sqrt(counts).sum()
    np.testing.assert_allclose(drawn / drawn.sum(), expected, atol=0.004)


@pytest.mark.parametrize("rule", ["balanced", "square_root"])
def test_a_class_gives_all_its_images_before_any_again(shards, rule):
    ids = order(shards, rule).ids(0, 3000)
    for number, count in enumerate(class_counts(shards)):
        own = ids[shards.rows["generator"][ids] == number]
        for cycle in range(len(own) // count):
            turn = own[cycle * count : (cycle + 1) * count]
            assert len(set(turn.tolist())) == count
        if len(own) >= 2 * count > 20:
            assert own[:count].tolist() != own[count : 2 * count].tolist()


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 5000), length=st.integers(1, 400), rule=st.sampled_from(["balanced", "square_root"])
)
def test_any_slice_is_the_slice_of_the_whole(shards, start, length, rule):
    whole = order(shards, rule).ids(0, start + length)
    assert np.array_equal(order(shards, rule).ids(start, start + length), whole[start:])


def test_seeds_differ_and_steps_take_their_batches(shards):
    assert not np.array_equal(order(shards, seed=0).ids(0, 50), order(shards, seed=1).ids(0, 50))
    config = DataConfig(sampling="balanced", window_shards=2)
    training = TrainingOrder(shards, config, 0, 16)
    steps = np.concatenate([training.step_ids(step) for step in range(20)])
    assert np.array_equal(steps, order(shards).ids(0, 320))
    natural = TrainingOrder(shards, DataConfig(window_shards=2), 0, 16)
    assert training.steps_per_epoch == natural.steps_per_epoch
    known = np.count_nonzero(shards.rows["object"][training.step_ids(3)] >= 0)
    assert training.known_objects(3) == known


def test_a_part_without_some_generators_balances_those_it_has(tiny_shards, shards):
    rows = shards.rows
    part = ShardSet(tiny_shards, "train")
    part.rows = rows[np.isin(rows["generator"], [0, 2])]
    drawn = part.rows["generator"][order(part).ids(0, 40)]
    assert Counter(drawn.tolist()) == {0: 20, 2: 20}


@pytest.mark.parametrize("window", [1, 3, 100])
def test_known_objects_are_counted_for_steps_of_many_windows_and_of_part_of_one(tiny_shards, window):
    shards = ShardSet(tiny_shards, "train")
    known = shards.rows["object"] >= 0
    for batch in (5, 48, len(shards)):
        training = TrainingOrder(shards, DataConfig(size=24, window_shards=window), 0, batch)
        for step in range(2 * training.steps_per_epoch):
            assert training.known_objects(step) == np.count_nonzero(known[training.step_ids(step)])


@pytest.mark.parametrize("known", [0, 1])
def test_nothing_is_counted_where_the_manifest_says_that_all_are_alike(tiny_shards, known):
    shards = ShardSet(tiny_shards, "train")
    shards.manifest["splits"]["train"]["objects_known"] = known * len(shards)
    assert TrainingOrder(shards, DataConfig(size=24), 0, 16).known_objects(3) == 16 * known
