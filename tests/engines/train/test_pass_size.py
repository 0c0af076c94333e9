"""How many micro-batches a pass holds: from memory, from the configuration, from a checkpoint."""

import pytest
import torch

from engines.config.detector import TrainConfig
from engines.runtime.distributed import World
from engines.train.pass_size import choose_micro_batches, even_passes, fitting_micro_batches


def world(device="cpu", size=1):
    return World(rank=0, size=size, local_rank=0, device=torch.device(device), distributed=False)


def never(micro_batches):
    raise AssertionError("nothing is to be measured")


def choose(device="cpu", size=1, obstacles=(), stored=0, peak_bytes=never, **train):
    config = TrainConfig(global_batch=256, micro_batch=16, **train)
    return choose_micro_batches(
        config, world(device, size), obstacles=obstacles, stored=stored, peak_bytes=peak_bytes
    )


def test_what_fits_is_what_the_line_through_two_measurements_says():
    # 3 for what a pass takes whatever it holds, 10 for each micro-batch.
    for count in range(1, 9):
        assert fitting_micro_batches(13, 23, 3 + 10 * count, 100) == count
        assert fitting_micro_batches(13, 23, 2 + 10 * count, 100) == max(1, count - 1)
    assert fitting_micro_batches(13, 23, 10**9, 16) == 16
    assert fitting_micro_batches(13, 13, 1000, 16) == 16
    assert fitting_micro_batches(13, 23, 0, 16) == 1


def test_passes_are_as_few_and_as_even_as_can_be():
    for share in range(1, 40):
        for most in range(1, 20):
            held = even_passes(share, most)
            assert 1 <= held <= most
            assert -(-share // held) == -(-share // most)
            assert held == 1 or -(-share // (held - 1)) > -(-share // held)


def test_a_cpu_runs_one_micro_batch_at_a_time_unless_told():
    assert choose() == 1
    assert choose(pass_images=64) == 4
    assert choose(pass_images=4096) == 16  # all of the step
    assert choose(size=5, pass_images=4096) == 4  # all that the busiest of five ranks has


def test_a_gpu_keeps_what_a_checkpoint_chose():
    assert choose("cuda", stored=8) == 8
    assert choose("cuda", size=8, stored=8) == 2
    assert choose("cuda", stored=8, pass_images=32) == 2


def test_layers_that_would_see_the_pass_keep_it_to_one_micro_batch(caplog):
    assert choose(obstacles=["backbone.norm"], pass_images=64) == 1
    assert "backbone.norm" in caplog.text
    caplog.clear()
    assert choose(obstacles=["backbone.norm"]) == 1
    assert not caplog.text
    assert choose("cuda", obstacles=["backbone.norm"]) == 1
    assert "one micro-batch of 16 images" in caplog.text


@pytest.mark.parametrize("images", [8, 24, 0, -16])
def test_a_pass_is_whole_micro_batches(images):
    with pytest.raises(
        ValueError, match=r"train\.pass_images is .*, expected auto or a multiple of train\.micro_batch, 16"
    ):
        TrainConfig(global_batch=256, micro_batch=16, pass_images=images)
