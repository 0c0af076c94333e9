"""Exact resume, and the same training on 1, 2 and 3 processes: the promise of the project."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import environment, flags

WORLDS = (1, 2, 3)  # a step has four micro-batches: three processes run 1, 1 and 2 of them
STEPS_PER_EPOCH = 7
# In mid-epoch, before and at the epoch's end, before the last.
RESUME_FROM = (3, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 9)


@pytest.fixture(scope="module")
def seen(
    tiny_shards: Path, torchrun: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """What each world size saw, from one launch each."""
    output = tmp_path_factory.mktemp("exactness")
    words = [str(output), ",".join(map(str, RESUME_FROM)), *flags(data__shards=tiny_shards)]
    for world in WORLDS:
        command = torchrun(world, "tests/integration/exactness_worker.py", *words)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:4000]
    return {world: torch.load(output / f"world_{world}.pt", weights_only=True) for world in WORLDS}


def test_the_epoch_is_as_long_as_these_tests_think(seen):
    assert seen[1]["steps_per_epoch"] == STEPS_PER_EPOCH
    assert len(seen[1]["losses"]) == 10


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("step", RESUME_FROM)
def test_resumed_equals_uninterrupted_bit_for_bit(seen, world, step):
    assert seen[world]["differences"][step] == []
    assert seen[world]["all_ranks_agree"]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_global_sequence_of_samples_and_crops_is_the_same(seen, world):
    for step, (ids, pixels) in enumerate(zip(seen[world]["ids"], seen[world]["pixels"], strict=True)):
        assert torch.equal(ids, seen[1]["ids"][step])
        assert torch.equal(pixels, seen[1]["pixels"][step])


def test_every_sample_is_seen_once_per_epoch(seen):
    for epoch in range(1):
        ids = torch.cat(seen[1]["ids"][epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH])
        assert len(ids) == len(set(ids.tolist())) == STEPS_PER_EPOCH * 16
    assert not torch.equal(seen[1]["ids"][0], seen[1]["ids"][STEPS_PER_EPOCH])


@pytest.mark.parametrize("world", WORLDS[1:])
def test_gradients_are_equal_at_the_same_micro_batch(seen, world):
    # Batch norm in training mode, and objects known for some ranks' images only.
    expected, found = seen[1]["gradient"], seen[world]["gradient"]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 0.1


@pytest.mark.parametrize("world", WORLDS[1:])
def test_losses_and_running_statistics_agree_between_world_sizes(seen, world):
    found, expected = (torch.tensor(seen[n]["losses"]) for n in (world, 1))
    # Training at this size is chaotic (batch norm over 4 images): rounding grows step by step.
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-3, atol=0)
    first, expected_first = (seen[n]["first_statistics"] for n in (world, 1))
    torch.testing.assert_close(first, expected_first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_with_a_nan_stops_all_before_the_update(seen, world):
    assert seen[world]["nan_changed"] == []
    for message in seen[world]["nan_messages"]:
        assert "step 1: the loss or its gradient is not finite" in message
        assert f"Sample ids of the step: {seen[1]['ids'][0][0].item()}, " in message
    assert len(seen[world]["nan_messages"]) == world
