"""The batches of a validation, pass after pass; on a GPU from one loader that is ahead when a pass begins."""

from collections.abc import Iterator

from dataio.loading.in_memory import InMemorySplit
from dataio.loading.loader import Batch
from dataio.loading.open_loader import open_loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import BatchSpec, evaluation_specs
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config
from engines.runtime.distributed import World
from engines.runtime.inference import inference_batch
from engines.runtime.precision import resolve_precision


class ValidationBatches:
    """Iterates this rank's share of a split once for each `iter`.

    On a CPU every pass has a loader of its own, in batches of `train.micro_batch`. On a GPU batches are
    those of `inference_batch`, and the loader is kept: its pipeline is built once, and the first batches
    of the next pass wait decoded while training goes on.

    Args:
        keep: keep the loader; None: on a GPU. quarantine, in_memory: of `shards`, see `open_loader`.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: Config,
        world: World,
        *,
        quarantine: Quarantine | None = None,
        in_memory: InMemorySplit | None = None,
        keep: bool | None = None,
    ) -> None:
        self._shards, self._config, self._world = shards, config, world
        self._quarantine, self._in_memory = quarantine, in_memory
        self._keep = world.device.type == "cuda" if keep is None else keep
        self._size = inference_batch(config.data.size, config.train.micro_batch, world.device)
        self._stop = len(shards) * (world.rank + 1) // world.size
        self._share = self._stop - len(shards) * world.rank // world.size
        self._kept: Iterator[Batch] | None = None
        self._held: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        if not self._share:
            return iter(())
        return self._next_pass() if self._keep else self._open(self._specs())

    def _specs(self) -> Iterator[BatchSpec]:
        rank, size = self._world.rank, self._world.size
        return evaluation_specs(self._shards, self._config.data, batch=self._size, rank=rank, world=size)

    def _endless(self) -> Iterator[BatchSpec]:
        while True:
            yield from self._specs()

    def _open(self, specs: Iterator[BatchSpec]) -> Iterator[Batch]:
        return open_loader(
            self._shards,
            self._config.data,
            specs,
            batch=self._size,
            device=self._world.device,
            train=False,
            half=resolve_precision(self._config.train.precision, self._world.device) != "fp32",
            quarantine=self._quarantine,
            in_memory=self._in_memory,
        )

    def _next_pass(self) -> Iterator[Batch]:
        """The batches up to the share's last sample.

        Damaged samples are left out, the last ones as well; then the pass is over where ids begin anew.
        """
        last = -1
        complete = False
        try:
            self._kept = self._kept or self._open(self._endless())
            while last < self._stop - 1:
                batch = self._held or next(self._kept)
                self._held = None
                if int(batch.sample_id[0]) <= last:
                    self._held = batch
                    break
                last = int(batch.sample_id[-1])
                yield batch
            complete = True
        finally:
            if not complete:  # abandoned, or failed: the next pass must begin with the first sample
                self._kept = self._held = None
