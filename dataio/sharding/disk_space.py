"""Check that the shards will fit on the disk before the first is written."""

import shutil
from itertools import islice
from pathlib import Path

from dataio.core.errors import UserError
from dataio.images.opening import Undecodable
from dataio.sharding.plan import ShardPlan, ShardSpec, read_task
from dataio.sharding.writer import WORK, encode_source, member_json
from dataio.shards.tar_reader import TAR_BLOCK
from dataio.sources.source import Source

_SAMPLED = 64  # images: enough to estimate the size within a few per cent
_BESIDE = 200  # bytes per image in the indexes and sidecars, at most


def space_needed(output: Path, plan: ShardPlan, tasks: list[ShardSpec], source: Source) -> int:
    """Estimate of the shards' size in bytes, from a sample of encoded images.

    The plan is a permutation, so the first images of some shards are a random sample.
    """
    if not tasks:
        return 0
    some = tasks[:: -(-len(tasks) // _SAMPLED)]
    sizes = []
    for task in some:
        for path, generator, label, subset in islice(
            read_task(output / WORK, task), -(-_SAMPLED // len(some))
        ):
            try:
                made, *_ = encode_source(source, path, plan.policy)
            except Undecodable:
                sizes.append(0)
                continue
            about = member_json(generator, label, plan.objects, plan.object_in_json, path, subset)
            blocks = sum(1 + -(-len(data) // TAR_BLOCK) for data in (made.data, about))
            sizes.append(blocks * TAR_BLOCK + _BESIDE)
    return round(sum(sizes) / len(sizes) * sum(task.count for task in tasks))


def check_space(output: Path, plan: ShardPlan, tasks: list[ShardSpec], source: Source) -> None:
    """Raise a UserError where the disk has no room for the shards; quotas are not considered."""
    needed, free = space_needed(output, plan, tasks, source), shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"{len(tasks)} shards need about {_size(needed)} and {_size(free)} are free, "
            f"so {_size(needed - free)} are missing; make room, or choose another disk",
            field="output",
            value=output,
        )


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
