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
    """An image whose generator was named wrongly.

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
    """What a validation found.

    Attributes:
        metrics: errors as fractions and mean losses, None where no object is known.
        confusion: int64 [G, G], images of generator (row) that were given another's name (column).
        mistakes: the hardest first; empty where none were asked for.
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
    """Judge `model` on every image of `shards` exactly once, over all ranks.

    Args:
        model: is left in evaluation mode. config: `log.images` says how many mistakes to keep.
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
        sums.add(generator_logits, object_logits, batch.generator, batch.object)
        pairs = batch.generator * classes + generator_logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=classes * classes)
        if config.log.images:
            mistakes += _mistakes(batch, generator_logits.float(), config)
            mistakes = sorted(mistakes, reverse=True)[: config.log.images]
    if world.distributed:
        dist.all_reduce(confusion)
        if config.log.images:
            everybodys: list[list[Mistake]] = [[] for _ in range(world.size)]
            dist.all_gather_object(everybodys, mistakes)
            mistakes = sorted((m for own in everybodys for m in own), reverse=True)[: config.log.images]
    metrics = sums.reduce(world).metrics((config.loss.generator, config.loss.object))
    return Validation(metrics, confusion.view(classes, classes).cpu().numpy(), mistakes)


def _mistakes(batch: Batch, logits: torch.Tensor, config: Config) -> list[Mistake]:
    """The wrongly named images of a batch that are hardest, at most `log.images`."""
    loss = F.cross_entropy(logits, batch.generator, reduction="none")
    answer = logits.argmax(1)
    loss = torch.where(answer == batch.generator, -1.0, loss)
    hardest, places = loss.topk(min(config.log.images, len(loss)))
    pixels = to_pixels(batch.image[places], config.data.mean, config.data.std)
    p_fake = 1 - logits.softmax(1)[places, 0]
    chosen = batch.sample_id[places.cpu()].tolist()
    columns = (hardest.tolist(), chosen, batch.generator[places].tolist(), answer[places].tolist())
    return [
        Mistake(value, sample_id, image, truth, said, fake)
        for value, sample_id, truth, said, image, fake in zip(*columns, pixels, p_fake.tolist(), strict=True)
        if value >= 0
    ]
