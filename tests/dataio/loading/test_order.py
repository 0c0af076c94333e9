"""The order and the crops are pure functions, and good shuffles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.core.counter_rng import hash64, uniform, uniforms
from dataio.loading.crops import center_boxes, train_boxes
from dataio.loading.order import EpochOrder

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@given(shard_sizes, st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_and_any_slicing_gives_the_same(sizes, window, seed, epoch):
    order = EpochOrder(np.array(sizes), seed, epoch, window)
    whole = order.ids(0, len(order))
    assert sorted(whole) == list(range(sum(sizes)))
    pieces = [order.ids(at, min(at + 7, len(order))) for at in range(0, len(order), 7)]
    assert np.array_equal(np.concatenate(pieces), whole)
    middle = EpochOrder(np.array(sizes), seed, epoch, window).ids(len(order) // 2, len(order))
    assert np.array_equal(middle, whole[len(order) // 2 :])


@given(shard_sizes, st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_the_sets_of_a_range_are_its_ids(sizes, window, data):
    order = EpochOrder(np.array(sizes), 3, 1, window)
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    every = np.arange(len(order))
    found = [every[ids] for ids in order.id_sets(start, stop)]
    assert sorted(np.concatenate([[], *found])) == sorted(order.ids(start, stop))


def test_epochs_and_seeds_differ_and_repeat():
    sizes = np.full(10, 50)
    first = EpochOrder(sizes, 1, 0, 4).ids(0, 500)
    assert np.array_equal(first, EpochOrder(sizes, 1, 0, 4).ids(0, 500))
    for seed, epoch in ((1, 1), (2, 0)):
        assert np.mean(first == EpochOrder(sizes, seed, epoch, 4).ids(0, 500)) < 0.05


def test_reads_stay_within_a_window_of_shards():
    sizes = np.full(12, 30)
    ids = EpochOrder(sizes, 0, 0, 3).ids(0, 360)
    for start in range(0, 360, 90):
        assert len(set(ids[start : start + 90] // 30)) == 3


def test_the_order_never_changes_between_versions():
    # These numbers are a promise: a checkpoint of today resumes in the same order for ever.
    assert EpochOrder(np.array([4, 3, 5]), 7, 2, 2).ids(0, 12).tolist() == GOLDEN_ORDER
    assert int(hash64(1, 2, 3)) == GOLDEN_HASH


GOLDEN_ORDER = [4, 3, 6, 1, 5, 0, 2, 9, 8, 7, 11, 10]
GOLDEN_HASH = 16701863140368406653


def test_uniform_is_uniform_and_draws_are_independent():
    positions = np.arange(200_000)
    a, b = (uniform(3, 1, 3, positions, draw) for draw in (0, 1))
    assert a.min() >= 0 and a.max() < 1
    assert abs(np.histogram(a, 20, (0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.01


def test_draws_at_once_are_the_draws_one_by_one():
    for positions in (np.arange(7), np.arange(12).reshape(3, 4), np.array([2**62, 5])):
        together = uniforms(5, 2, 3, positions, 4)
        assert np.array_equal(together, [uniform(5, 2, 3, positions, draw) for draw in range(4)])


def test_positions_outside_an_epoch_are_refused():
    with pytest.raises(IndexError, match="outside an epoch of 5"):
        EpochOrder(np.array([5]), 0, 0, 1).ids(3, 6)


def boxes(crop, size, pad=0, width=60, height=40, n=4000, scale=(0.35, 1.0)):
    position = np.arange(n)
    return train_boxes(
        crop, size, pad, scale, (0.75, 4 / 3), 0.5, 0, 0, position, np.full(n, width), np.full(n, height)
    )


def test_random_crops_are_square_and_reach_every_offset():
    found, flips = boxes("random", 32, pad=4)
    assert set(map(tuple, found[:, 2:])) == {(32, 32)}
    assert set(found[:, 0]) == set(range(-4, 40 + 4 - 32 + 1))
    assert set(found[:, 1]) == set(range(-4, 60 + 4 - 32 + 1))
    assert abs(flips.mean() - 0.5) < 0.05


def test_stepped_crops_reach_every_step_alike_and_nothing_between():
    one = np.arange(2000)
    found, _ = train_boxes(
        "random", 32, 4, (1, 1), (1, 1), 0.5, 0, 0, one, np.full(2000, 37), np.full(2000, 32), 4
    )
    assert set(found[:, 0]) == {-4, 0, 4}
    assert set(found[:, 1]) == {-4, 0, 4, 8}
    counts = np.unique(found[:, :2], axis=0, return_counts=True)[1]
    assert len(counts) == 12 and counts.min() > 100


def test_a_random_crop_of_a_small_image_stays_inside_it():
    found, _ = boxes("random", 64, width=20, height=100)
    assert (found[:, 3] == 20).all() and (found[:, 1] == 0).all()
    assert (found[:, 2] == 64).all() and found[:, 0].max() == 36


def test_random_resized_crops_keep_area_and_aspect_and_stay_inside():
    found, _ = boxes("random_resized", 32, width=500, height=500, scale=(0.2, 0.5))
    y, x, h, w = found.T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= 500).all() and (y + h <= 500).all()
    area, aspect = h * w / 250_000, w / h
    assert 0.19 < area.min() < 0.21 and 0.49 < area.max() < 0.51
    assert aspect.min() > 0.74 and aspect.max() < 1.35


def test_centre_boxes_are_centred_squares_of_the_shortest_side():
    found, flips = center_boxes(0.875, np.array([256, 300]), np.array([256, 100]))
    assert found.tolist() == [[16, 16, 224, 224], [6, 106, 88, 88]]
    assert flips.tolist() == [0, 0]
