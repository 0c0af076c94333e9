"""Augmentation on the real DALI: each operation does what it says, and only position decides."""

from typing import Any

import numpy as np
import pytest
import torch

from dataio.loading.augment import BLUR, ERASE, JPEG, RAND, SIDE, WEBP, AugmentConfig, draw_augment_params
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.shards.shard_set import ShardSet

CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "rand_augment": 2,
    "blur": 0.5,
    "resize": 0.5,
    "jpeg": 0.5,
    "webp": 0.3,
    "erase": 0.5,
}


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return ShardSet(tiny_shards, "train")


def images(shards, *, first=0, last=3, rank=0, world=1, flip=0.0, **augment):
    """Steps first..last-1 of 16 images: float [N, 3, 24, 24]."""
    config = DataConfig(size=24, crop="random", flip=flip, window_shards=2, augment=AugmentConfig(**augment))
    order = TrainingOrder(shards, config, 7, 16)
    work = training_specs(order, micro_batch=8, rank=rank, world=world, first_step=first, last_step=last)
    return torch.cat([b.image.clone() for b in Loader(shards, config, work, batch=8, device=CPU, train=True)])


def fine_energy(pixels):
    """What a 3 x 3 average leaves, per image: where a generator's traces are."""
    rough = torch.nn.functional.avg_pool2d(pixels, 3, 1)
    return (pixels[:, :, 1:-1, 1:-1] - rough).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def plain(shards):
    return images(shards)


def test_what_is_not_chosen_passes_bit_for_bit(shards, plain):
    half = images(shards, jpeg=0.5, blur=0.3)
    params = draw_augment_params(AugmentConfig(jpeg=0.5, blur=0.3), 24, 7, 0, np.arange(48))
    chosen = (params[:, JPEG] > 0) | (params[:, BLUR] > 0)
    same = [bool(torch.equal(a, b)) for a, b in zip(half, plain, strict=True)]
    assert same == (~chosen).tolist() and 10 < chosen.sum() < 44


def test_blur_takes_fine_detail_and_more_sigma_takes_more(shards, plain):
    little, much = (images(shards, blur=1.0, blur_sigma=(s, s)) for s in (0.5, 2.0))
    assert (fine_energy(little) < fine_energy(plain)).all()
    assert (fine_energy(much) < 0.5 * fine_energy(little)).all()


def test_scaling_down_and_back_takes_fine_detail(shards, plain):
    small = images(shards, resize=1.0, resize_scale=(0.5, 0.5))
    assert (fine_energy(small) < 0.7 * fine_energy(plain)).all()
    torch.testing.assert_close(small.mean((1, 2, 3)), plain.mean((1, 2, 3)), atol=0.1, rtol=0)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_compression_moves_pixels_more_at_lower_quality(shards, plain, codec):
    moved = []
    for quality in (10, 90):
        squeezed = images(shards, **{codec: 1.0, f"{codec}_quality": (quality, quality)})
        moved.append((squeezed - plain).square().mean().item())
    assert moved[0] > 2 * moved[1] > 0


def test_erasing_makes_one_rectangle_of_the_mean_and_nothing_else(shards, plain):
    found = images(shards, erase=1.0, erase_area=(0.1, 0.3))
    params = draw_augment_params(AugmentConfig(erase=1.0, erase_area=(0.1, 0.3)), 24, 7, 0, np.arange(48))
    for image, before, (y, x, height, width) in zip(
        found, plain, params[:, ERASE:RAND].astype(int), strict=True
    ):
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[y : y + height, x : x + width] = True
        assert inside.sum() == height * width > 0
        assert not image[:, inside].any()
        assert torch.equal(image[:, ~inside], before[:, ~inside])


def test_rand_augment_uses_all_its_operations_and_grows_with_its_magnitude(shards, plain):
    moved = [
        (images(shards, rand_augment=1, rand_magnitude=m) - plain).square().mean().item() for m in (2, 25)
    ]
    assert moved[1] > 1.5 * moved[0] > 0
    params = draw_augment_params(AugmentConfig(rand_augment=2), 24, 0, 0, np.arange(2000))
    assert set(params[:, RAND].tolist()) == set(params[:, RAND + 2].tolist()) == set(range(14))
    assert set(params[:, RAND + 1].tolist()) == {0.0, 1.0}
    identity = draw_augment_params(AugmentConfig(rand_augment=1), 24, 7, 0, np.arange(48))[:, RAND] == 13
    once = images(shards, rand_augment=1)
    assert identity.any()
    for number in np.flatnonzero(identity):
        assert torch.equal(once[number], plain[number])


def test_any_start_and_any_number_of_processes_give_the_same_pixels(shards):
    whole = images(shards, flip=0.5, **EVERYTHING)
    assert torch.equal(images(shards, first=1, flip=0.5, **EVERYTHING), whole[16:])
    halves = [images(shards, rank=rank, world=2, flip=0.5, **EVERYTHING) for rank in (0, 1)]
    joined = torch.cat([half[8 * step : 8 * step + 8] for step in range(3) for half in halves])
    assert torch.equal(joined, whole)


def test_epochs_differ(shards):
    config = AugmentConfig(**EVERYTHING)
    first, second = (draw_augment_params(config, 24, 7, epoch, np.arange(64)) for epoch in (0, 1))
    assert (first != second).any(0).all()


def test_evaluation_is_never_augmented(tiny_shards):
    shards, pixels = ShardSet(tiny_shards, "test"), []
    for augment in (AugmentConfig(), AugmentConfig(**EVERYTHING)):
        config = DataConfig(size=24, augment=augment)
        work = evaluation_specs(shards, config, batch=8, rank=0, world=1)
        pixels.append(
            torch.cat(
                [b.image.clone() for b in Loader(shards, config, work, batch=8, device=CPU, train=False)]
            )
        )
    assert torch.equal(*pixels)


def test_draws_keep_their_shares_and_ranges():
    config = AugmentConfig(
        blur=0.2, resize=0.4, jpeg=0.6, webp=0.8, jpeg_quality=(40, 42), webp_quality=(0, 1)
    )
    params = draw_augment_params(config, 100, 0, 0, np.arange(20_000))
    for column, expected in ((BLUR, 0.2), (SIDE, 0.4), (JPEG, 0.6), (WEBP, 0.8)):
        assert (params[:, column] > 0).mean() == pytest.approx(expected, abs=0.02)
    assert set(params[:, JPEG].tolist()) == {0.0, 40.0, 41.0, 42.0}
    assert set(params[:, WEBP].tolist()) == {0.0, 1.0, 2.0}  # one more than the quality
    sides = params[params[:, SIDE] > 0, SIDE]
    assert sides.min() >= 50 and sides.max() <= 150 and not params[:, ERASE:].any()


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"jpeg": 1.5}, "jpeg is 1.5"),
        ({"jpeg_quality": (0, 50)}, "jpeg_quality"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"rand_magnitude": 31}, "rand_magnitude"),
        ({"erase_area": (0.5, 1.5)}, "erase_area"),
    ],
)
def test_values_out_of_range_name_the_key(bad, key):
    with pytest.raises(ValueError, match=rf"data\.augment\.?.*{key}"):
        AugmentConfig(**bad)
