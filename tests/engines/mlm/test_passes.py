"""A global batch dealt out to any number of processes: every conversation once, as many passes each."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.mlm.dataset import GlobalOrder
from engines.mlm.passes import Passes, PassSampler

COUNTS = st.integers(1, 40)


def all_ranks(batch, micro, world, loss):
    return [Passes.of(batch, micro, rank=rank, world=world, loss=loss) for rank in range(world)]


@settings(max_examples=200, deadline=None)
@given(COUNTS, COUNTS, COUNTS, st.sampled_from(["tokens", "batches"]))
def test_every_position_once_in_as_many_passes_on_each_rank(batch, micro, world, loss):
    ranks = all_ranks(batch, micro, world, loss)
    held = [position for passes in ranks for part in passes.parts for position in part]
    assert held == list(range(batch))
    assert len({len(passes.parts) for passes in ranks}) == 1
    sizes = [len(part) for passes in ranks for part in passes.parts]
    assert max(sizes) <= micro
    if loss == "tokens":
        assert max(sum(map(len, passes.parts)) for passes in ranks) == -(-batch // world)


@settings(max_examples=200, deadline=None)
@given(COUNTS, COUNTS, COUNTS)
def test_averaged_micro_batches_are_the_same_on_any_number_of_processes(batch, micro, world):
    parts = [part for passes in all_ranks(batch, micro, world, "batches") for part in passes.parts if part]
    assert parts == list(Passes.of(batch, micro, rank=0, world=1, loss="batches").parts)


@pytest.mark.parametrize(("world", "passes"), [(1, 4), (2, 2), (3, 2), (5, 1), (8, 1), (16, 1)])
def test_a_pass_is_as_full_as_it_may_be(world, passes):
    assert {len(p.parts) for p in all_ranks(8, 2, world, "tokens")} == {passes}


def test_the_sampler_gives_the_steps_of_the_order_and_marks_empty_passes():
    order = GlobalOrder(13, 4, seed=3)
    samplers = [PassSampler(order, 4, passes) for passes in all_ranks(4, 2, 5, "tokens")]
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        expected = list(order)
        steps = list(zip(*samplers, strict=True))
        assert len(steps) == 3 == len(samplers[0])
        for number, parts in enumerate(steps):
            first = expected[4 * number]
            held = [index for part in parts for index in part if index >= 0]
            assert held == expected[4 * number : 4 * number + 4]
            assert [part for part in parts if part[0] < 0] == [[~first]]
