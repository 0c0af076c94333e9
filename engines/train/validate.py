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
from dataio.loading.pixels import to_pixels
from dataio.loading.quarantine import Quarantine
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config
from engines.runtime.distributed import World
from engines.train.meters import MetricSums
from engines.train.validation_batches import ValidationBatches
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
    batches: ValidationBatches | None = None,
) -> Validation:
    """Evaluate `model` on every image of `shards` exactly once, over all ranks.

    All sums stay on the device until the end, so a GPU's host does not wait for it.

    Args:
        model: is left in evaluation mode. config: `log.images` is the number of mistakes to keep.
        each_batch: is called before each batch. quarantine, in_memory: of `shards`, see `open_loader`.
        batches: of `shards`, kept from one validation to the next; then quarantine and in_memory are its own.
    """
    model.eval()
    sums = MetricSums.empty(world.device)
    classes = len(model.generators)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    hardest = _HardestMistakes(config.log.images)
    if batches is None:
        batches = ValidationBatches(
            shards, config, world, quarantine=quarantine, in_memory=in_memory, keep=False
        )
    for batch in batches:
        each_batch()
        generator_logits, object_logits = model(batch.image)
        sums.add(generator_logits, object_logits, batch.generator, batch.object_label)
        pairs = batch.generator * classes + generator_logits.argmax(1)
        confusion.scatter_add_(0, pairs, torch.ones_like(pairs))  # bincount waits for the device
        if config.log.images:
            hardest.add(batch, generator_logits.float())
    mistakes = hardest.mistakes(config)
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


class _HardestMistakes:
    """The images with the highest losses among the mistakes so far, kept on the device.

    Args:
        count: how many at most.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # loss float [k], -1 where the answer is right; sample id, truth, answer int64 [k]; p_fake float [k];
        # image float [k, 3, S, S].
        self._kept: tuple[torch.Tensor, ...] = ()

    def add(self, batch: Batch, logits: torch.Tensor) -> None:
        """Look at one batch; logits float32 [N, G]. The host does not wait."""
        loss = F.cross_entropy(logits, batch.generator, reduction="none")
        answer = logits.argmax(1)
        loss = torch.where(answer == batch.generator, -1.0, loss)
        ids = batch.sample_id.to(loss.device, non_blocking=True)
        p_fake = 1 - logits.softmax(1)[:, 0]
        found = self._highest((loss, ids, batch.generator, answer, p_fake, batch.image))
        if self._kept:
            found = self._highest(tuple(torch.cat(pair) for pair in zip(self._kept, found, strict=True)))
        self._kept = found

    def _highest(self, columns: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        places = columns[0].topk(min(self._count, len(columns[0]))).indices
        return tuple(column[places] for column in columns)

    def mistakes(self, config: Config) -> list[Mistake]:
        """What was found, the hardest first."""
        if not self._kept:
            return []
        *columns, image = self._kept
        pixels = to_pixels(image, config.data.mean, config.data.std)
        found = [
            Mistake(loss, sample_id, picture, truth, answer, p_fake)
            for loss, sample_id, truth, answer, p_fake, picture in zip(
                *(column.tolist() for column in columns), pixels, strict=True
            )
            if loss >= 0
        ]
        return sorted(found, reverse=True)
