"""The measures tell good orders from bad ones, and the two-level shuffle is nearly a full permutation."""

import numpy as np
import pytest

from engines.benchmark.scale_shuffle import compare_shuffles, shuffle_quality, shuffle_table

COUNT, SHARDS, BATCH = 48_000, 240, 100


@pytest.fixture(scope="module")
def found():
    rows = compare_shuffles(SHARDS, COUNT // SHARDS, BATCH, (1, 4, 16, 64))
    return {(row["set"], row["window"]): row for row in rows}


@pytest.mark.parametrize("window", [1, 4, 16, 64, "all"])
def test_on_our_shards_every_window_draws_batches_as_a_full_permutation(found, window):
    row = found["permuted", window]
    # Five standard errors of 480 batches' mean chi-square of 8 and of 999 degrees of freedom.
    assert abs(row["generator_spread"] - 1) < 5 * (2 / 8 / 480) ** 0.5
    assert abs(row["object_spread"] - 1) < 5 * (2 / 999 / 480) ** 0.5
    assert abs(row["label_and_next"]) < 5 * COUNT**-0.5


def test_on_sorted_shards_a_larger_window_is_nearer_to_a_full_permutation(found):
    spreads = [found["sorted", window]["generator_spread"] for window in (1, 4, 16, 64, "all")]
    assert spreads[0] > 50 and spreads == sorted(spreads, reverse=True)
    assert abs(spreads[-1] - 1) < 5 * (2 / 8 / 480) ** 0.5
    # A window of W shards of one class each spreads by about batch / W of the full chi-square.
    assert spreads[2] < 2 * BATCH / 16 and spreads[3] < 2 * BATCH / 64
    labels = [found["sorted", window]["label_and_next"] for window in (1, 4, 16, 64, "all")]
    assert labels[0] > 0.9 and labels[2] < 0.15 and abs(labels[4]) < 5 * COUNT**-0.5


@pytest.mark.parametrize("kind", ["permuted", "sorted"])
def test_places_depend_neither_on_ids_nor_on_the_epoch_before(found, kind):
    for window in (1, 4, 16, 64, "all"):
        row = found[kind, window]
        # Whole windows move together: as if there were only so many as shards.
        bound = 5 * (COUNT if window == "all" else SHARDS) ** -0.5
        assert abs(row["position_and_id"]) < bound and abs(row["epoch_and_next"]) < bound
        mixed = SHARDS if window == "all" else int(window)
        expected = (COUNT / SHARDS - 1) / (COUNT / SHARDS * mixed)
        assert row["neighbours_of_one_shard"] == pytest.approx(expected, rel=0.15)


def test_an_order_that_is_none_is_seen():
    ids, sizes = np.arange(6000), np.full(60, 100)
    generator = ids // 1000
    row = shuffle_quality(ids, ids, generator, generator, sizes, 60)
    assert row["position_and_id"] == pytest.approx(1) and row["epoch_and_next"] == pytest.approx(1)
    assert row["label_and_next"] > 0.99 and row["neighbours_of_one_shard"] > 0.98
    assert row["generator_spread"] > 50
    swapped = shuffle_quality(ids[::-1], ids, generator, generator, sizes, 60)
    assert swapped["position_and_id"] == pytest.approx(-1)
    even = shuffle_quality(ids.reshape(6, 1000).T.ravel(), ids, generator, generator, sizes, 60)
    assert even["generator_spread"] == pytest.approx(0)  # too even to be random is seen too


def test_the_table_has_every_row(found):
    lines = shuffle_table(list(found.values())).splitlines()
    assert len(lines) == 2 + 10 and lines[0].startswith("| set | window | position and id |")
    assert "| sorted | all | " in lines[-1]
