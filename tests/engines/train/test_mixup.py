"""MixUp and CutMix: what is mixed, by how much, and that nothing but (seed, step, place) decides."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta, kstest

from engines.config.detector import MixConfig
from engines.train.mixup import apply_mix, draw_mix, image_before
from models.detector.dual_head import LabelMixture, dual_head_loss


def draws(config, side, *, seed=0, step=0, micro_batches=range(1)):
    return draw_mix(config, height=side, width=side, seed=seed, step=step, micro_batches=micro_batches)


def mix(config, image, *, seed, step, micro_batch):
    """A micro-batch mixed by itself, and its own share."""
    drawn = draw_mix(
        config,
        height=image.shape[2],
        width=image.shape[3],
        seed=seed,
        step=step,
        micro_batches=range(micro_batch, micro_batch + 1),
    )
    before = image_before(len(image), 1, image.device)
    mixed = apply_mix(image, before, torch.from_numpy(drawn.blend), torch.from_numpy(drawn.box))
    return mixed, float(drawn.own_share[0])


@pytest.fixture
def image():
    return torch.rand(6, 3, 16, 20, generator=torch.Generator().manual_seed(1))


def shares(config, count=600):
    return draws(config, 64, micro_batches=range(count)).own_share


def test_mixup_blends_each_image_with_the_one_before(image):
    mixed, own = mix(MixConfig(mixup=1.0), image, seed=3, step=5, micro_batch=2)
    assert 0.5 < own < 1
    torch.testing.assert_close(mixed, own * image + (1 - own) * image.roll(1, 0))


def test_cutmix_pastes_one_box_and_counts_its_area(image):
    for step in range(20):
        mixed, own = mix(MixConfig(cutmix=1.0), image, seed=3, step=step, micro_batch=0)
        pasted = (mixed == image.roll(1, 0)).all(1)[0]
        assert torch.equal(mixed, torch.where(pasted, image.roll(1, 0), image))
        assert own == pytest.approx(1 - pasted.float().mean().item()) and own >= 0.45
        rows, columns = pasted.any(1), pasted.any(0)
        assert pasted.sum() == rows.sum() * columns.sum()  # a box


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_shares_follow_the_beta_distribution_folded_at_one_half(alpha):
    found = shares(MixConfig(mixup=alpha))
    folded = kstest(found, lambda x: beta.cdf(x, alpha, alpha) - beta.cdf(1 - x, alpha, alpha))
    assert folded.pvalue > 0.01


def test_probability_and_both_kinds():
    mixed = shares(MixConfig(mixup=1.0, probability=0.25)) < 1
    assert 0.18 < mixed.mean() < 0.32
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    both = MixConfig(mixup=1.0, cutmix=1.0)
    pasted = [
        bool((mix(both, images, seed=0, step=s, micro_batch=0)[0] == images).float().mean() > 0.2)
        for s in range(200)
    ]
    assert 0.35 < np.mean(pasted) < 0.65


def test_a_micro_batch_that_is_not_mixed_keeps_its_very_pixels(image):
    mixed, own = mix(MixConfig(mixup=1.0, probability=0.0), image, seed=0, step=0, micro_batch=0)
    assert torch.equal(mixed, image) and own == 1


def test_a_pass_mixes_each_micro_batch_as_alone():
    images = torch.rand(15, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    both = MixConfig(mixup=0.4, cutmix=1.0, probability=0.8)
    drawn = draws(both, 16, seed=4, step=9, micro_batches=range(2, 7))
    together = apply_mix(
        images, image_before(15, 5, images.device), torch.from_numpy(drawn.blend), torch.from_numpy(drawn.box)
    )
    for place in range(5):
        alone, own = mix(both, images[3 * place : 3 * place + 3], seed=4, step=9, micro_batch=2 + place)
        assert torch.equal(together[3 * place : 3 * place + 3], alone)
        assert drawn.own_share[place] == np.float32(own)
    assert len(set(drawn.own_share.tolist())) > 3


def test_only_seed_step_and_place_decide(image):
    def once(seed, step, place):
        return mix(MixConfig(mixup=1.0), image, seed=seed, step=step, micro_batch=place)[1]

    torch.manual_seed(1)
    first = once(0, 1, 2)
    torch.manual_seed(2)
    assert first == once(0, 1, 2)
    assert len({first, once(1, 1, 2), once(0, 2, 2), once(0, 1, 3)}) == 4


def rolled(own_share):
    return LabelMixture(image_before(4, 1, torch.device("cpu")), torch.full((4,), own_share))


def test_the_loss_is_that_of_soft_labels_on_both_heads():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator), torch.randn(4, 5, generator=generator)
    labels = torch.tensor([0, 2, 1, 2]), torch.tensor([4, 0, 3, 1])
    found = dual_head_loss(*logits, *labels, mixture=rolled(0.7))
    for loss, logit, label in zip(found, logits, labels, strict=True):
        one_hot = F.one_hot(label, logit.shape[1]).float()
        soft = 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)
        torch.testing.assert_close(loss, F.cross_entropy(logit, soft, reduction="sum"))


def test_unknown_objects_stay_out_and_the_shares_sum_to_the_known():
    logits = torch.zeros(4, 2), torch.zeros(4, 2)
    labels = torch.tensor([0, 1, 0, 1]), torch.tensor([1, -1, -1, 0])
    _, by_object = dual_head_loss(*logits, *labels, mixture=rolled(0.6))
    assert by_object.item() == pytest.approx(2 * np.log(2))


@pytest.mark.parametrize("bad", [{"mixup": -1}, {"cutmix": -0.1}, {"probability": 1.5}])
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=r"mix\."):
        MixConfig(**bad)
