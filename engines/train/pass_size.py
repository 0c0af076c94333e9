"""How many micro-batches a forward pass holds: given, or chosen from a GPU's memory."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dataio.core.log import log
from engines.config.detector import TrainConfig
from engines.runtime.distributed import World

# Images in the largest pass that is chosen: from 256 to 512 an H200 gains 5 % (docs/log.md), and more gains nothing.
MOST_IMAGES = 512
# Share of the free memory that passes may take: DALI's buffers, NCCL's and fragmentation have the rest.
_SHARE = 0.8


def fitting_micro_batches(one: int, two: int, free: int, most: int) -> int:
    """How many micro-batches fit, at least 1 and at most `most`.

    Args:
        one, two: bytes that a pass of one micro-batch takes at its peak, and of two.
        free: bytes that passes may take.
    """
    each = max(1, two - one)
    return max(1, min(most, (free - one) // each + 1))


def even_passes(share: int, most: int) -> int:
    """Micro-batches in a pass, so that `share` of them need the fewest passes, which are of nearly one size."""
    passes = -(-share // most)
    return -(-share // passes)


def choose_micro_batches(
    config: TrainConfig,
    world: World,
    *,
    obstacles: Sequence[str],
    stored: int,
    peak_bytes: Callable[[int], int],
) -> int:
    """The micro-batches that a pass holds, equal on all ranks.

    Args:
        obstacles: layers that make the result depend on it; then a pass holds one, and the log says why.
        stored: what a checkpoint of this run chose on such a device, 0 for none.
        peak_bytes: runs a pass of so many micro-batches on the GPU; bytes at its peak.
    """
    total = config.global_batch // config.micro_batch
    share = -(-total // world.size)  # the largest of any rank
    if obstacles:
        if config.pass_images != config.micro_batch and (
            world.device.type == "cuda" or config.pass_images != "auto"
        ):
            log.warning(
                f"a pass holds one micro-batch of {config.micro_batch} images: {', '.join(obstacles[:3])} would make "
                "the result depend on it"
            )
        return 1
    if config.pass_images != "auto":
        return min(share, config.pass_images // config.micro_batch)
    if world.device.type != "cuda" or share == 1:
        return 1
    most = min(share, max(1, MOST_IMAGES // config.micro_batch))
    # Ranks on other cards than the checkpoint's measure, so all of them have to agree.
    fitting = min(share, stored) if stored else _measured(world, most, peak_bytes)
    if world.distributed and world.size > 1:
        least = torch.tensor(fitting, device=world.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        fitting = int(least)
    return even_passes(share, fitting)


def _measured(world: World, most: int, peak_bytes: Callable[[int], int]) -> int:
    """What this rank's GPU holds."""
    if most == 1:
        return 1
    try:
        one, two = peak_bytes(1), peak_bytes(2)
    except torch.cuda.OutOfMemoryError:
        return 1
    torch.cuda.empty_cache()
    free = int(_SHARE * torch.cuda.mem_get_info(world.device)[0])
    return fitting_micro_batches(one, two, free, most)
