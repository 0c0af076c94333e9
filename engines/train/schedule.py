"""The steps of a run, and what its result depends on besides the configuration: data and processes."""

import hashlib
from dataclasses import dataclass

from dataio.core.errors import UserError
from dataio.loading.training_order import micro_batches_of
from dataio.shards.shard_set import ShardSet
from dataio.shards.shard_table import shard_digests
from engines.config.detector import Config, TrainConfig
from engines.runtime.distributed import World


@dataclass(frozen=True)
class StepSchedule:
    """When a run validates, saves and ends, in steps.

    Attributes:
        total_steps: of the run. steps_per_epoch: of the training split.
        frozen_steps: at the start, in which only the heads learn.
        validate_every, save_every: steps between validations and between checkpoints.
    """

    total_steps: int
    steps_per_epoch: int
    frozen_steps: int
    validate_every: int
    save_every: int

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> "StepSchedule":
        frozen = config.train.frozen_epochs
        total = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
        return cls(
            total,
            steps_per_epoch,
            min(total, round(frozen * steps_per_epoch)) if frozen >= 0 else total,
            config.train.validate_every or steps_per_epoch,
            config.checkpoint.every or steps_per_epoch,
        )

    def validates_after(self, step: int) -> bool:
        """Whether validation follows once `step` steps are done."""
        return step % self.validate_every == 0 or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.total_steps


def data_fingerprint(shards: ShardSet) -> str:
    """SHA-256 over the digests of a split's tars: the same for equal data in any folder."""
    digest = hashlib.sha256()
    for digests in shard_digests(shards.shards):
        digest.update(digests.encode())
    return digest.hexdigest()


def share_of_micro_batches(config: TrainConfig, world: World) -> range:
    """The micro-batches of a step that this process runs; see `micro_batches_of`.

    Raises:
        UserError: more processes than micro-batches.
    """
    total = config.global_batch // config.micro_batch
    if total < world.size:
        raise UserError(
            f"{world.size} processes, but train.global_batch {config.global_batch} has only {total} "
            f"micro-batches of train.micro_batch {config.micro_batch}; use at most {total} processes, raise "
            "train.global_batch, or lower train.micro_batch (which batch norm depends on)"
        )
    return micro_batches_of(total, world.rank, world.size)
