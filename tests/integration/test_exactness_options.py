"""Exact resume and equal gradients on 1 and 3 processes with the training options switched on."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import environment, flags

WORLDS = (1, 3)
pytestmark = pytest.mark.slow
RESUME_FROM = (3, 4, 8)  # in the frozen epochs, at the thaw, after it
OPTIONS = {
    "train__steps": 10,
    "train__ema": 0.9,
    "train__frozen_epochs": 4 / 7,
    "mix__mixup": 0.4,
    "mix__cutmix": 1.0,
    "data__sampling": "balanced",
    "data__augment__rand_augment": 1,
    "data__augment__jpeg": 0.5,
    "data__augment__erase": 0.5,
    "model__head_hidden": 8,
    "model__head_dropout": 0.5,
    "optim__clip": 1.0,
}


# One process runs two passes of two micro-batches, three run one pass each, of one or two.
PASSES = {"train__pass_images": 8}
# What only DALI does cannot be asked for of images held decoded.
HELD = {"data__resident": True, "data__augment__rand_augment": 0, "data__augment__jpeg": 0}


@pytest.fixture(
    scope="module",
    params=[{}, PASSES, pytest.param(HELD, marks=pytest.mark.long)],
    ids=["decoded", "passes of two", "held"],
)
def seen(
    request: pytest.FixtureRequest, tiny_shards: Path, torchrun: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    output = tmp_path_factory.mktemp("options")
    options = {**OPTIONS, **request.param}
    words = [str(output), ",".join(map(str, RESUME_FROM)), *flags(data__shards=tiny_shards, **options)]
    for world in WORLDS:
        command = torchrun(world, "tests/integration/exactness_worker.py", *words)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:4000]
    return {world: torch.load(output / f"world_{world}.pt", weights_only=True) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("step", RESUME_FROM)
def test_resumed_equals_uninterrupted_bit_for_bit(seen, world, step):
    assert seen[world]["differences"][step] == []
    assert seen[world]["all_ranks_agree"]


def test_three_processes_see_the_pixels_and_the_gradient_of_one(seen):
    for step, (ids, pixels) in enumerate(zip(seen[3]["ids"], seen[3]["pixels"], strict=True)):
        assert torch.equal(ids, seen[1]["ids"][step]) and torch.equal(pixels, seen[1]["pixels"][step])
    # Dropout and mixing are drawn for the micro-batch, wherever it runs.
    expected, found = seen[1]["gradient"], seen[3]["gradient"]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 0.01
