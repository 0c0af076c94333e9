"""What a number of processes does with a configuration's batch, known before anything is started."""

from dataclasses import dataclass

import torch

from engines.config.detector import Config
from engines.runtime.distributed import World
from engines.train.optim import rate_scale
from engines.train.pass_size import MOST_IMAGES, even_passes
from engines.train.schedule import StepSchedule, share_of_micro_batches


@dataclass(frozen=True)
class BatchPlan:
    """A step's images, dealt out.

    Attributes:
        global_batch: images of a step. micro_batch: images whose statistics batch norm takes.
        micro_batches: how many each process has, by rank; they differ by at most one.
        passes: forward passes of the process that has the most. pass_images: images of its largest one.
        learning_rate: at its peak, see `engines.train.optim.rate_scale`.
        steps: of the run; None where only the number of training images decides and it was not given.
    """

    global_batch: int
    micro_batch: int
    micro_batches: tuple[int, ...]
    passes: int
    pass_images: int
    learning_rate: float
    steps: int | None


def plan_batches(
    config: Config, processes: int, *, most_images: int = MOST_IMAGES, train_images: int | None = None
) -> BatchPlan:
    """How `processes` share a step.

    Args:
        most_images: what a GPU's memory holds in a pass; used where `train.pass_images` is auto.
        train_images: of the training split.

    Raises:
        UserError: more processes than micro-batches.
    """
    train = config.train
    device = torch.device("cpu")
    counts = tuple(
        len(share_of_micro_batches(train, World(rank, processes, 0, device, processes > 1)))
        for rank in range(processes)
    )
    share = max(counts)
    if train.pass_images == "auto":
        held = even_passes(share, max(1, min(share, most_images // train.micro_batch)))
    else:
        held = min(share, train.pass_images // train.micro_batch)
    steps = train.steps or None
    if train_images is not None:
        steps = StepSchedule.of(config, train_images // train.global_batch).total_steps
    return BatchPlan(
        train.global_batch,
        train.micro_batch,
        counts,
        -(-share // held),
        held * train.micro_batch,
        config.optim.lr * rate_scale(config.optim, train.global_batch),
        steps,
    )
