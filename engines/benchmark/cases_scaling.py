"""Benchmark cases of several processes: how much of each is left when they train together."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import BenchmarkSettings, Group, Run, Unavailable
from engines.benchmark.detector import detector_config, synchronize
from engines.runtime.distributed import init_distributed, shutdown_distributed
from engines.train.trainer import Trainer

_COLD_STEPS = 2


def _rank(connection: Connection, settings: BenchmarkSettings, environment: dict[str, str]) -> None:
    """One process of a run as torchrun would start it: so many steps whenever it is told."""
    os.environ.update(environment)
    world = init_distributed()
    config = detector_config(settings)
    # The batch of a process stays what it is: twice the processes, twice the images in a step.
    train = replace(
        config.train, global_batch=config.train.micro_batch * world.size, micro_batch=config.train.micro_batch
    )
    train.threads = 1
    data = replace(config.data, threads=1 if settings.device == "cpu" else 0)
    config = replace(config, train=train, data=data)
    trainer = Trainer(config, world, ShardSet(config.data.shards, "train"), None)
    connection.send(trainer.config.train.global_batch)
    while steps := connection.recv():
        for _ in range(steps):
            trainer.train_step()
        synchronize(settings)
        connection.send(trainer.pop_data_wait())
    shutdown_distributed(world)


def _processes(settings: BenchmarkSettings, requested: int) -> int:
    """`wanted` processes, 0 for as many as there is room for: GPUs, or the two of a small CPU."""
    room = torch.cuda.device_count() if settings.device == "cuda" else 2
    if requested == 0 and room < 2:
        raise Unavailable("there is one GPU")
    return requested or room


def _case(requested: int) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        count = _processes(settings, requested)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        spawning = get_context("spawn")
        pipes, members = [], []
        for rank in range(count):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            environment |= {
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            ours, theirs = spawning.Pipe()
            member = spawning.Process(target=_rank, args=(theirs, settings, environment), daemon=True)
            member.start()
            theirs.close()
            pipes.append(ours)
            members.append(member)
        batch = max([pipe.recv() for pipe in pipes])  # the same from all, once all are there
        steps = _COLD_STEPS

        def once() -> Run:
            nonlocal steps
            begin = time.perf_counter()
            for pipe in pipes:
                pipe.send(steps)
            waits = [pipe.recv() for pipe in pipes]
            seconds = time.perf_counter() - begin
            images = batch * steps
            extra = {
                "processes": float(count),
                "images_per_second_each": images / seconds / count,
                "data_wait_share": sum(waits) / count / seconds,
            }
            # All ranks do the same number of steps, so it is settled beforehand.
            steps = max(1, round(steps * settings.seconds / seconds))
            return Run(images, seconds, extra=extra)

        try:
            yield once
        finally:
            for pipe in pipes:
                pipe.send(0)
            for member in members:
                member.join(30)
                member.kill()

    return case


scaling = Group(
    "scaling",
    "training from shards under DDP, one thread in each process, as many images for each",
    "images",
    {"telltale, 2 processes (all GPUs)": _case(0), "telltale, 1 process": _case(1)},
)
GROUPS = {scaling.name: scaling}
