"""What the processes of a multi-GPU check do together: all-reduce, train a few steps, train for a while."""

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from dataio.shards.shard_set import ShardSet
from engines.benchmark.check_report import CheckTask
from engines.benchmark.detector import detector_config, synchronize
from engines.config.detector import Config
from engines.runtime.distributed import World
from engines.train.trainer import Trainer

GHOSTS = 8
"""Micro-batches of the steps whose losses are compared: one at least for each of eight GPUs."""
_COLD_STEPS = 3


def time_all_reduce(world: World, task: CheckTask, sizes: Sequence[int]) -> dict[str, Any]:
    """Time all-reduces of float32 tensors.

    Args:
        sizes: of the tensors, bytes.

    Returns:
        rows: for each size its bytes, the microseconds of one, and bus bandwidth in GB/s, which is
        2 (n - 1) / n times bytes / time (NCCL's nccl-tests, doc/PERFORMANCE.md) and so is the same for any
        number n of processes on one kind of link. peers: pairs of GPUs that reach each other's memory.

    Raises:
        RuntimeError: a sum is wrong.
    """
    rows = []
    for size in sizes:
        data = torch.full((size // 4,), world.rank + 1.0, device=world.device)
        dist.all_reduce(data)
        total = world.size * (world.size + 1) / 2
        if not bool((data == total).all()):
            raise RuntimeError(
                f"an all-reduce of {size} bytes gave {data.unique()[:4].tolist()}, not {total}"
            )
        data.zero_()  # sums of sums would overflow
        count = (3 if task.tiny else 40) if size < 2**26 else 10
        for _ in range(2):
            dist.all_reduce(data)
        world.barrier()
        synchronize(task.settings)
        begin = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(data)
        synchronize(task.settings)
        seconds = (time.perf_counter() - begin) / count
        bus = 2 * (world.size - 1) / world.size * size / seconds / 1e9
        rows.append({"bytes": size, "us": 1e6 * seconds, "gb_per_second": bus})
        del data
    found: dict[str, Any] = {"rows": rows}
    if world.device.type == "cuda":
        pairs = itertools.permutations(range(world.size), 2)
        found["peers"] = sum(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
    return found


# ---- losses -----------------------------------------------------------------------------------


def follow_losses(world: World, task: CheckTask, steps: int, graph: str) -> dict[str, Any]:
    """Train some steps of one global batch, whatever the number of processes.

    In fp32 without TF32, by a decoder whose bits do not depend on load, at a small rate: rounding stays small.

    Args:
        graph: `train.graph`.

    Returns:
        losses, norms: of each step, and its gradient's norms. spread: the largest difference of a weight
        between this rank and another; 0 where all have the same. ms: of a step, the first two left out.
        how: {"how": how passes are launched}, {} on a CPU.
    """
    config = detector_config(task.settings)
    batch = GHOSTS * (2 if task.tiny else 8)
    config = replace(
        config,
        data=replace(config.data, deterministic=True, threads=1 if task.settings.device == "cpu" else 0),
        optim=replace(config.optim, lr=1e-4, schedule="constant", warmup=0.0),
        train=replace(
            config.train,
            global_batch=batch,
            micro_batch=batch // GHOSTS,
            pass_images=batch // GHOSTS,
            precision="fp32",
            graph=graph,  # type: ignore[arg-type]
            threads=1,
        ),
    )
    trainer = _trainer(config, world)
    losses, norms, begin = [], [], time.perf_counter()
    for step in range(steps):
        if step == min(2, steps - 1):
            synchronize(task.settings)
            begin = time.perf_counter()
        trainer.train_step()
        metrics = trainer.pop_metrics()
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    synchronize(task.settings)
    seconds = time.perf_counter() - begin
    return {
        "losses": losses,
        "norms": norms,
        "spread": _spread(trainer.model, world),
        "ms": 1e3 * seconds / max(1, steps - 2),
        "how": _how(trainer),
    }


def _spread(model: torch.nn.Module, world: World) -> float:
    weights = torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])
    first = weights.clone()
    dist.broadcast(first, 0)
    difference = (weights - first).abs().max().cpu()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return float(difference)


# ---- rates ------------------------------------------------------------------------------------


def measure_rates(world: World, task: CheckTask) -> dict[str, Any]:
    """Train as `detector_config` says, as many images for each process: on one batch, then from shards.

    Returns:
        step, shards: images/s of all processes. data_wait_share: of the time from shards, the mean over
        ranks. how: {"how": how passes are launched}, {} on a CPU.
    """
    config = detector_config(task.settings)
    train = replace(config.train, global_batch=config.train.micro_batch * world.size, threads=1)
    data = replace(config.data, threads=1 if task.settings.device == "cpu" else 0)
    trainer = _trainer(replace(config, train=train, data=data), world)
    # From shards first: the loader cannot be had again once its batches are replaced.
    shards, waited = _rate(trainer, task, world)
    trainer.use_batches(itertools.repeat(next(trainer.batches())))
    step, _ = _rate(trainer, task, world)
    return {"step": step, "shards": shards, "data_wait_share": waited, "how": _how(trainer)}


def _rate(trainer: Trainer, task: CheckTask, world: World) -> tuple[float, float]:
    """Images/s of all processes and the mean share of time without data; all ranks call it together."""
    gc.collect()
    gc.freeze()
    seconds = _seconds(trainer, task, world, _COLD_STEPS)
    seconds = _seconds(trainer, task, world, _COLD_STEPS)
    # All ranks must do the same number of steps; batches that wait decoded must not be all of them.
    wanted = task.settings.seconds * task.repeats
    steps = max(2 if task.tiny else 20, round(wanted * _COLD_STEPS / seconds))
    trainer.pop_data_wait()
    seconds = _seconds(trainer, task, world, steps)
    waited = torch.tensor(trainer.pop_data_wait() / seconds)
    dist.all_reduce(waited)
    gc.unfreeze()
    return steps * trainer.config.train.global_batch / seconds, float(waited) / world.size


def _seconds(trainer: Trainer, task: CheckTask, world: World, steps: int) -> float:
    """Seconds of so many steps, of the slowest rank and so the same on all."""
    synchronize(task.settings)
    world.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    synchronize(task.settings)
    seconds = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _how(trainer: Trainer) -> dict[str, str]:
    how = trainer.runner.describe()
    return {"how": how} if how else {}


def _trainer(config: Config, world: World) -> Trainer:
    return Trainer(config, world, ShardSet(config.data.shards, "train"), None)
