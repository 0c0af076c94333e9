"""What a pass holds does not change the losses; and rounding does not grow where a GPU is compared with a CPU."""

import pytest
import torch

from tests.trainers import OPTIONS, STEADY, build_trainer, share_pixels, train_losses

# Of tests/gpu/test_training_gpu.py.
RANDOM = {
    "mix__mixup": 0.4,
    "mix__cutmix": 1.0,
    "model__head_hidden": 8,
    "model__head_dropout": 0.5,
    "train__ema": 0.9,
}


@pytest.mark.parametrize("options", [{}, RANDOM], ids=["plain", "mixing and dropout"])
def test_losses_do_not_depend_on_what_a_pass_holds(tiny_shards, options):
    found = []
    for images in (16, 32, 64):
        changes = {**STEADY, "train__global_batch": 64, **options, "train__pass_images": images}
        trainer = build_trainer(tiny_shards, "cpu", **changes)
        found.append(train_losses(trainer, 4))
        assert [len(each) * 16 for each in trainer.runner.passes] == [images] * (64 // images)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
    assert len(set(found[0])) == 4


@pytest.mark.parametrize("name", OPTIONS)
def test_rounding_does_not_grow_in_the_comparison_with_a_gpu(tiny_shards, name):
    """Weights that are off by 1e-5, more than a GPU's rounding, move the losses by less than is allowed there."""
    changes = {**STEADY, **OPTIONS[name]}
    exact, rounded = (build_trainer(tiny_shards, "cpu", **changes) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in rounded.model.parameters():
            parameter.mul_(1 + 1e-5 * torch.randn_like(parameter))
    share_pixels([exact, rounded], 8)
    expected = train_losses(exact, 8)
    found = train_losses(rounded, 8)
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-3)
