"""How a global batch is dealt out to processes and cut into passes, on any number of processes.

ZeRO's collectives run inside every forward and backward pass, so all processes must make the
same number of passes in every step. Processes may hold unequal numbers of conversations; one
that has none left for a pass runs a conversation whose labels are all ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from torch.utils.data import DataLoader, Sampler

from dataio.loading.training_order import micro_batches_of


@dataclass(frozen=True)
class Passes:
    """The passes of one process in every step.

    Attributes:
        parts: for each pass, the positions in the global batch that it holds; may be empty.
        units: micro-batches of the global batch over all processes, which `loss: batches` averages.
    """

    parts: tuple[range, ...]
    units: int

    @classmethod
    def of(
        cls,
        global_batch: int,
        micro_batch: int,
        *,
        rank: int,
        world: int,
        loss: Literal["tokens", "batches"],
    ) -> "Passes":
        """Deal out a global batch.

        Args:
            micro_batch: the most conversations of a pass; with `loss` batches a pass is one
                micro-batch, since each is averaged by itself, and only the last may be smaller.
        """
        units = ceil(global_batch / micro_batch)
        if loss == "batches":
            numbers = micro_batches_of(units, rank, world)
            parts = [range(n * micro_batch, min((n + 1) * micro_batch, global_batch)) for n in numbers]
            count = ceil(units / world)
            return cls((*parts, *[range(0)] * (count - len(parts))), units)
        own = micro_batches_of(global_batch, rank, world)
        count = ceil(ceil(global_batch / world) / micro_batch)
        cuts = [micro_batches_of(len(own), number, count) for number in range(count)]
        return cls(tuple(range(own.start + cut.start, own.start + cut.stop) for cut in cuts), units)


class PassSampler(Sampler[list[int]]):
    """The conversations of each pass of one process, as indices for the data set.

    A pass without conversations gives [~i]: conversation i with all labels ignored, see
    `ConversationDataset`.

    Args:
        order: a sampler of conversations with `set_epoch`, whole global batches of them.
    """

    def __init__(self, order: Any, global_batch: int, passes: Passes) -> None:
        self._order, self._batch, self._passes = order, global_batch, passes

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order) // self._batch * len(self._passes.parts)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._order)
        for start in range(0, len(order), self._batch):
            step = order[start : start + self._batch]
            for part in self._passes.parts:
                yield [step[position] for position in part] or [~step[0]]


class PassLoader(DataLoader[Any]):
    """A DataLoader of passes; not for accelerate to prepare, which would deal them out once more."""

    def __init__(self, dataset: Any, sampler: PassSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=sampler, **options)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch; the Trainer calls it before each."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
