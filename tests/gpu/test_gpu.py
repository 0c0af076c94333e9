"""What needs a GPU: decoding and augmenting there, mixed precision, updates that are masked on the device."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading.augment import AugmentConfig
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.shards.shard_set import ShardSet
from tests.trainers import build_trainer, train_losses

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run `pytest tests/gpu` on a machine with one"
)


def images(shards: ShardSet, device: str, config: DataConfig) -> torch.Tensor:
    work = evaluation_specs(shards, config, batch=16, rank=0, world=1)
    loader = Loader(shards, config, work, batch=16, device=torch.device(device), train=False)
    return torch.cat([batch.image.cpu() for batch in loader])


def test_decoding_on_the_gpu_stays_within_a_grey_level_of_the_cpu(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    config = DataConfig(size=24, eval_crop=0.75, deterministic=True)
    difference = (images(shards, "cuda:0", config) - images(shards, "cpu", config)).abs()
    grey_level = 1 / 255 / np.mean(config.std)
    assert difference.mean() < 0.5 * grey_level
    assert difference.max() < 6 * grey_level


def test_deterministic_decoding_repeats_its_bits(tiny_shards):
    shards, config = ShardSet(tiny_shards, "train"), DataConfig(size=24, deterministic=True)
    assert torch.equal(images(shards, "cuda:0", config), images(shards, "cuda:0", config))


@pytest.fixture
def build(tiny_shards):
    return partial(build_trainer, tiny_shards)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(build, precision):
    changes = {"train__steps": 20, "train__micro_batch": 16, "optim__lr": 0.02, "loss__object": 0}
    found = train_losses(build("cuda:0", train__precision=precision, **changes), 20)
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


def test_a_bad_update_is_masked_on_the_device_and_reported_at_the_next_log(build):
    trainer = build("cuda:0")
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = trainer.next_batch()
    batch.image.fill_(torch.nan)
    trainer.next_batch = lambda: batch
    trainer.train_step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, trainer.model.parameters(), strict=True))
    with pytest.raises(UserError, match="step 2: the loss or its gradient is not finite"):
        trainer.pop_metrics()


def test_validation_agrees_with_the_cpu(build):
    found, expected = build("cuda:0", train__precision="fp32").validate(), build("cpu").validate()
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=0.02)


AUGMENT: dict[str, dict[str, Any]] = {
    "rand_augment": {"rand_augment": 2},
    "jpeg": {"jpeg": 1.0},
    "resize": {"resize": 1.0},
    "blur": {"blur": 1.0},
    "erase": {"erase": 1.0},
    "webp": {"webp": 1.0},
}


def training_images(shards, device, **augment):
    config = DataConfig(size=24, crop="random", deterministic=True, augment=AugmentConfig(**augment))
    order = TrainingOrder(shards, config, 7, 16)
    work = training_specs(order, micro_batch=16, rank=0, world=1, first_step=0, last_step=1)
    loader = Loader(shards, config, work, batch=16, device=torch.device(device), train=True)
    return next(iter(loader)).image.float().cpu()


@pytest.mark.parametrize("name", AUGMENT)
def test_augmentation_on_the_gpu_is_the_cpus(tiny_shards, name):
    shards = ShardSet(tiny_shards, "train")
    plain = training_images(shards, "cuda:0")
    found = training_images(shards, "cuda:0", **AUGMENT[name])
    expected = training_images(shards, "cpu", **AUGMENT[name])
    assert not torch.equal(plain, found)
    # The same draws: what differs is rounding, and the decoders' own differences.
    assert (found - expected).abs().mean() < 0.25 * (plain - expected).abs().mean() + 0.05
