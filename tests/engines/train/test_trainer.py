"""The trainer in this process: golden losses, the masked update, what resume refuses."""

import json
from pathlib import Path

import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading.loader import Batch
from dataio.loading.training_order import passes_of
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.train.schedule import share_of_micro_batches
from engines.train.trainer import Trainer
from tests.support import flags

GOLDEN = Path(__file__).parents[2] / "assets" / "golden_losses.json"
# Small steps and a batch norm over 16 images, so that rounding does not grow.
STEADY = {"train__steps": 20, "train__micro_batch": 16, "optim__lr": 1e-4, "loss__object": 0.1}
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def build(tiny_shards, repo_root):
    def make(world=ALONE, **changes):
        config = parse_config(
            flags(data__shards=tiny_shards, **changes), repo_root / "configs" / "quickstart.yaml"
        )
        return Trainer(config, world, ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val"))

    return make


def train(trainer, steps):
    losses = []
    for _ in range(steps):
        trainer.train_step()
        losses.append(trainer.pop_metrics()["loss"])
    return losses


def test_golden_losses_of_20_steps(build):
    # Bits belong to one CPU model and one Pillow; a changed order, crop, loss, schedule or
    # initialisation moves these far beyond the tolerance.
    losses = train(build(**STEADY), 20)
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-2)


def test_a_rate_for_another_batch_is_scaled_by_the_batch_in_use(build):
    trainer = build(optim__lr=0.01, optim__lr_batch=64, optim__schedule="constant", optim__warmup=0)
    trainer.train_step()
    assert trainer.pop_metrics()["lr"] == pytest.approx(0.01 * 16 / 64)


def test_training_learns(build):
    losses = train(build(train__steps=20, train__micro_batch=16, optim__lr=0.02, loss__object=0), 20)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_where_the_host_does_not_wait_a_bad_update_is_masked_and_reported_later(build):
    trainer = build(train__steps=6)
    trainer.checks_every_step = False
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    next_batch = trainer.next_batch

    def poisoned():
        batch = next_batch()
        batch.image.fill_(torch.nan)
        return batch

    trainer.next_batch = poisoned
    trainer.train_step()
    trainer.next_batch = next_batch
    trainer.train_step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, trainer.model.parameters(), strict=True))
    with pytest.raises(UserError, match="step 2: the loss or its gradient is not finite"):
        trainer.pop_metrics()


def test_clipping_bounds_the_step(build):
    moved = []
    for clip in (0, 1e-3):
        trainer = build(optim__clip=clip, optim__weight_decay=0, optim__warmup=0, optim__schedule="constant")
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train_step()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        moved.append((after - before).norm().item())
    # Nesterov's first step is (1 + momentum) * lr * gradient.
    assert moved[1] == pytest.approx(1.9 * 0.005 * 1e-3, rel=0.02) and moved[0] > 10 * moved[1]


def test_loss_weights_and_unknown_objects(build):
    trainer = build(loss__object=0, optim__weight_decay=0)
    trainer.train_step()
    assert trainer.model.object_head.weight.grad is None  # cleared after the update
    head = trainer.model.object_head.weight.detach().clone()
    trainer.train_step()
    assert torch.equal(head, trainer.model.object_head.weight.detach())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_fp32(build, precision):
    small = {"train__steps": 2, "train__micro_batch": 16, "data__size": 16, "optim__lr": 1e-4}
    exact, mixed = train(build(**small), 2), train(build(**small, train__precision=precision), 2)
    assert mixed == pytest.approx(exact, rel=0.05)
    assert mixed != exact


def test_more_processes_than_micro_batches_are_refused(build):
    world = World(rank=0, size=5, local_rank=0, device=torch.device("cpu"), distributed=False)
    with pytest.raises(
        UserError,
        match=r"5 processes, but train.global_batch 16 has only 4 micro-batches .* at most 4 processes",
    ):
        build(world)


def test_any_number_of_processes_and_passes_of_any_size_add_up_to_the_same_step(build):
    """8 micro-batches on 1 to 8 processes in passes of 1, 2 and 4, summed by hand as the collectives sum them."""
    trainer = build(
        train__global_batch=32,
        train__micro_batch=4,
        model__head_hidden=16,
        model__head_dropout=0.3,
        mix__mixup=0.5,
    )
    batches = [trainer.next_batch() for _ in range(8)]
    before = trainer.statistics.flat.clone()
    trainer._update = lambda: None

    def joined(numbers):
        parts = [batches[number] for number in numbers]
        names = ("image", "generator", "object_label", "sample_id")
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def part(rank, size, held):
        """A rank's part of the first step: its micro-batches, gradient, statistics and metrics."""
        world = World(rank=rank, size=size, local_rank=0, device=torch.device("cpu"), distributed=False)
        share = share_of_micro_batches(trainer.config.train, world)
        trainer.world = trainer.runner._world = world
        trainer.step, trainer.runner.passes = 0, passes_of(share, held)
        trainer.use_batches(map(joined, trainer.runner.passes))
        trainer.statistics.flat.copy_(before)
        trainer.optimizer.zero_grad()
        trainer.train_step()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        sums = trainer.statistics.sums.clone(), trainer.runner.sums.sums.clone()
        return list(share), torch.cat(gradients), *sums

    _, gradient, statistics, metrics = part(0, 1, 1)
    assert gradient.norm() > 0.1
    for size, held in [(1, 2), (1, 4), (1, 8), (1, 3), *((size, 1 + size % 3) for size in range(2, 9))]:
        parts = [part(rank, size, held) for rank in range(size)]
        assert [number for numbers, *_ in parts for number in numbers] == list(range(8))
        assert {len(numbers) for numbers, *_ in parts} <= {8 // size, -(-8 // size)}
        # DDP takes the mean over ranks; each rank's loss is multiplied by their number.
        found = torch.stack([g for _, g, *_ in parts]).mean(0)
        assert (found - gradient).norm() <= 1e-5 * gradient.norm()
        torch.testing.assert_close(sum(s for _, _, s, _ in parts), statistics, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sum(m for *_, m in parts), metrics, rtol=1e-5, atol=1e-6)


def test_weights_that_do_not_fit_are_a_users_error(build, tmp_path):
    with pytest.raises(UserError, match=r"model\.weights: .* is neither a file nor torchvision weights"):
        build(model__weights=str(tmp_path / "none.pth"))


def test_one_image_at_a_time_is_refused_before_the_first_step(build):
    with pytest.raises(UserError, match=r"train\.micro_batch is 1, and for data\.size 32"):
        build(train__micro_batch=1, model__backbone="resnet18", model__stem="imagenet", data__size=32)
    assert build(
        train__micro_batch=1,
        train__frozen_epochs=-1,
        model__backbone="resnet18",
        model__stem="imagenet",
        data__size=32,
    )
