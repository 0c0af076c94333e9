"""One rank of the exactness tests: train, then continue from several steps, compare bits.

Started by torchrun from test_exactness.py; writes what it saw to OUTPUT/world_<n>.pt.
"""

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
import torch.distributed as dist

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.async_saver import snapshot
from engines.config.detector import parse_config
from engines.runtime.distributed import World, init_distributed, shutdown_distributed
from engines.train.trainer import Trainer
from tests.support import differences

ROOT = Path(sys.path[0])


def seen_state(trainer: Trainer) -> dict[str, Any]:
    return snapshot(trainer.state())


def record_step(trainer: Trainer, seen: dict[str, Any]) -> None:
    """One step, remembering this rank's sample ids, pixels and (once) the gradient."""
    next_batch, ids, pixels = trainer.next_batch, [], []

    def watched() -> Any:
        batch: Any = next_batch()
        ids.append(batch.sample_id.clone())
        pixels.append(batch.image.double().sum((1, 2, 3)))
        return batch

    def keep_gradient(optimizer: Any, args: Any, kwargs: Any) -> None:
        if "gradient" not in seen:
            seen["gradient"] = torch.cat(
                [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            )

    trainer.next_batch = watched  # type: ignore[method-assign]
    hook = trainer.optimizer.register_step_pre_hook(keep_gradient)
    trainer.train_step()
    hook.remove()
    trainer.next_batch = next_batch  # type: ignore[method-assign]
    for name, mine in (("ids", torch.cat(ids)), ("pixels", torch.cat(pixels))):
        parts: list[Any] = [mine]
        if trainer.world.distributed:  # as objects: ranks may have unequal numbers of images
            parts = [None] * trainer.world.size
            dist.all_gather_object(parts, mine)
        seen.setdefault(name, []).append(torch.cat(parts))


def poison_last_rank(trainer: Trainer, seen: dict[str, Any]) -> None:
    """Give one rank a NaN image; note what every rank says and what the weights became."""
    next_batch = trainer.next_batch

    def poisoned() -> Any:
        batch: Any = next_batch()
        if trainer.world.rank == trainer.world.size - 1:
            batch.image[0, 0, 0, 0] = torch.nan
        return batch

    trainer.next_batch = poisoned  # type: ignore[method-assign]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    message = "no error"
    try:
        trainer.train_step()
    except UserError as error:
        message = str(error)
    messages: list[Any] = [message]
    if trainer.world.distributed:
        messages = [None] * trainer.world.size
        dist.all_gather_object(messages, message)
    seen["nan_messages"] = messages
    seen["nan_changed"] = differences(before, [p.detach() for p in trainer.model.parameters()])


def main() -> None:
    output, resume_from, flags = Path(sys.argv[1]), [int(k) for k in sys.argv[2].split(",")], sys.argv[3:]
    world: World = init_distributed()
    config = parse_config(flags, ROOT / "configs" / "quickstart.yaml")
    sets = ShardSet(config.data.shards, "train"), ShardSet(config.data.shards, "val")
    trainer = Trainer(config, world, *sets)
    seen: dict[str, Any] = {"steps_per_epoch": trainer.schedule.steps_per_epoch, "losses": []}
    states = {}
    while trainer.step < trainer.schedule.total_steps:
        record_step(trainer, seen)
        seen["losses"].append(trainer.pop_metrics()["loss"])
        states[trainer.step] = seen_state(trainer)
        seen.setdefault("first_statistics", trainer.statistics.flat.clone())
    seen["validation"] = trainer.validate().metrics  # must leave no trace in what follows
    final = seen_state(trainer)
    seen["differences"] = {}
    for step in resume_from:
        again = Trainer(config, world, *sets)
        again.load_state(states[step])
        while again.step < again.schedule.total_steps:
            again.train_step()
            again.pop_metrics()
        seen["differences"][step] = differences(final, seen_state(again))
    poison_last_rank(Trainer(config, world, *sets), seen)
    seen["all_ranks_agree"] = True
    if world.distributed:
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, seen["differences"])
        seen["all_ranks_agree"] = all(f == seen["differences"] for f in found)
    if world.is_main:
        torch.save(seen, output / f"world_{world.size}.pt")
    shutdown_distributed(world)


if __name__ == "__main__":
    main()
