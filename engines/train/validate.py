"""A pass over the validation split: errors, the confusion of generators, the hardest mistakes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray

from dataio.loading.in_memory import InMemorySplit
from dataio.loading.loader import Batch
from dataio.loading.open_loader import open_loader
from dataio.loading.pixels import to_pixels
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import evaluation_specs
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config
from engines.runtime.distributed import World
from engines.train.meters import MetricSums
from models.detector.dual_head import DualHead


@dataclass(order=True)
class Mistake:
    """An image whose generator was predicted wrongly.

    Attributes:
        loss: the generator head's cross-entropy. sample_id: its row in the index.
        image: uint8 [H, W, 3], as the network saw it. truth, answer: generators.
        p_fake: 1 - P(nature).
    """

    loss: float
    sample_id: int
    image: NDArray[np.uint8] = field(compare=False)
    truth: int = field(compare=False)
    answer: int = field(compare=False)
    p_fake: float = field(compare=False)


@dataclass
class Validation:
    """The result of a validation.

    Attributes:
        metrics: errors as fractions and mean losses, None where no object is known, and for
            real/fake where the split has no photographs or no fakes.
        confusion: int64 [G, G], images of a generator (row) by predicted generator (column).
        mistakes: the hardest first; empty unless `log.images` is set.
    """

    metrics: dict[str, float | None]
    confusion: NDArray[np.int64]
    mistakes: list[Mistake]


@torch.no_grad()
def validate(
    model: DualHead,
    shards: ShardSet,
    config: Config,
    world: World,
    each_batch: Callable[[], None] = lambda: None,
    *,
    quarantine: Quarantine | None = None,
    in_memory: InMemorySplit | None = None,
) -> Validation:
    """Evaluate `model` on every image of `shards` exactly once, over all ranks.

    Args:
        model: is left in evaluation mode. config: `log.images` is the number of mistakes to keep.
        each_batch: is called before each batch. quarantine, in_memory: of `shards`, see `open_loader`.
    """
    model.eval()
    sums = MetricSums.empty(world.device)
    classes = len(model.generators)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    mistakes: list[Mistake] = []
    size = config.train.micro_batch
    work = evaluation_specs(shards, config.data, batch=size, rank=world.rank, world=world.size)
    loader = open_loader(
        shards,
        config.data,
        work,
        batch=size,
        device=world.device,
        train=False,
        quarantine=quarantine,
        in_memory=in_memory,
    )
    for batch in loader:
        each_batch()
        generator_logits, object_logits = model(batch.image)
        sums.add(generator_logits, object_logits, batch.generator, batch.object_label)
        pairs = batch.generator * classes + generator_logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=classes * classes)
        if config.log.images:
            mistakes += _mistakes(batch, generator_logits.float(), config)
            mistakes = sorted(mistakes, reverse=True)[: config.log.images]
    if world.distributed:
        dist.all_reduce(confusion)
        if config.log.images:
            parts: list[list[Mistake]] = [[] for _ in range(world.size)]
            dist.all_gather_object(parts, mistakes)
            mistakes = sorted((mistake for part in parts for mistake in part), reverse=True)[
                : config.log.images
            ]
    metrics = sums.reduce(world).metrics(
        (config.loss.generator, config.loss.object), both_classes=not shards.missing_class
    )
    return Validation(metrics, confusion.view(classes, classes).cpu().numpy(), mistakes)


def _mistakes(batch: Batch, logits: torch.Tensor, config: Config) -> list[Mistake]:
    """The mistakes of a batch with the highest loss, at most `log.images`."""
    loss = F.cross_entropy(logits, batch.generator, reduction="none")
    answer = logits.argmax(1)
    loss = torch.where(answer == batch.generator, -1.0, loss)
    hardest, places = loss.topk(min(config.log.images, len(loss)))
    pixels = to_pixels(batch.image[places], config.data.mean, config.data.std)
    p_fake = 1 - logits.softmax(1)[places, 0]
    chosen = batch.sample_id[places.cpu()].tolist()
    columns = (hardest.tolist(), chosen, batch.generator[places].tolist(), answer[places].tolist())
    return [
        Mistake(value, sample_id, image, truth, predicted, fake)
        for value, sample_id, truth, predicted, image, fake in zip(
            *columns, pixels, p_fake.tolist(), strict=True
        )
        if value >= 0
    ]
