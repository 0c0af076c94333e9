"""A step dealt out on paper: shares, passes, rate and steps."""

import pytest

from dataio.core.errors import UserError
from dataio.loading.training_order import micro_batches_of
from engines.config.detector import from_dict
from engines.train.batch_plan import plan_batches


def config(**train):
    optim = {"lr": 0.1, "lr_batch": 256}
    return from_dict({"train": {"global_batch": 1024, "micro_batch": 32, **train}, "optim": optim})


@pytest.mark.parametrize(
    ("processes", "most", "passes", "images"),
    [
        (1, 512, 2, 512),
        (1, 256, 4, 256),
        (1, 300, 4, 256),
        (8, 512, 1, 128),
        (8, 32, 4, 32),
        (32, 512, 1, 32),
    ],
)
def test_passes_hold_what_they_may(processes, most, passes, images):
    plan = plan_batches(config(), processes, most_images=most)
    assert (plan.passes, plan.pass_images) == (passes, images)
    assert plan.micro_batches == (32 // processes,) * processes
    assert plan.learning_rate == pytest.approx(0.4)


@pytest.mark.parametrize("processes", [3, 5, 6, 7])
def test_shares_are_the_trainers(processes):
    plan = plan_batches(config(), processes, most_images=512)
    assert plan.micro_batches == tuple(len(micro_batches_of(32, r, processes)) for r in range(processes))
    assert sum(plan.micro_batches) * plan.micro_batch == plan.global_batch == 1024
    assert plan.pass_images == max(plan.micro_batches) * 32


def test_a_given_size_is_taken():
    # As the trainer does, without making the last pass as large as the others: 8, 8 and 2.
    plan = plan_batches(config(global_batch=576, pass_images=256), 1, most_images=512)
    assert (plan.passes, plan.pass_images) == (3, 256)
    assert plan_batches(config(pass_images=256), 8).pass_images == 128


def test_passes_are_of_nearly_one_size():
    # 11 micro-batches, at most 8 in a pass: 6 and 5, not 8 and 3.
    assert plan_batches(config(), 3, most_images=256).pass_images == 6 * 32


def test_steps_are_known_where_their_number_or_the_images_are():
    assert plan_batches(config(), 1, most_images=512).steps is None
    assert plan_batches(config(steps=7), 1, most_images=512).steps == 7
    assert plan_batches(config(epochs=2.5), 1, most_images=512, train_images=10_300).steps == 25


def test_more_processes_than_micro_batches_are_an_error():
    with pytest.raises(UserError, match=r"33 processes, but train\.global_batch 1024 has only 32"):
        plan_batches(config(), 33, most_images=512)
