"""The detector that benchmark cases of training, saving and scaling share."""

from pathlib import Path

import torch

from dataio.loading.config import DataConfig
from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import BenchmarkSettings
from engines.config.base import RunConfig
from engines.config.detector import Config, OptimConfig, TrainConfig
from engines.runtime.distributed import World
from engines.train.trainer import Trainer
from models.detector.config import ModelConfig

# What two cores can train within a benchmark; a GPU gets ResNet-50 at 224 px.
CPU_SIDE, CPU_BATCH = 96, 32


def detector_config(settings: BenchmarkSettings, cpu_side: int = CPU_SIDE) -> Config:
    """What the cases train: ResNet-50 at 224 px on a GPU, ResNet-18 at `cpu_side` px on a CPU."""
    gpu = settings.device == "cuda"
    data = DataConfig(
        shards=str(Path(settings.folder) / "large"),
        size=224 if gpu else cpu_side,
        crop="random_resized" if gpu else "random",
        scale=(0.5, 1.0),
        eval_crop=0.875 if gpu else cpu_side / 256,
        threads=0 if gpu else settings.workers,
    )
    batch = settings.batch if gpu else min(settings.batch, CPU_BATCH)
    return Config(
        run=RunConfig(dir=settings.folder),
        data=data,
        model=ModelConfig(backbone="resnet50" if gpu else "resnet18"),
        optim=OptimConfig(lr=0.01),
        train=TrainConfig(
            steps=10**8, global_batch=batch, micro_batch=batch, threads=1 if gpu else settings.workers
        ),
    )


def world_of(settings: BenchmarkSettings) -> World:
    device = torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu")
    return World(0, 1, 0, device, False)


def synchronize(settings: BenchmarkSettings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def make_trainer(settings: BenchmarkSettings, cpu_side: int = CPU_SIDE) -> Trainer:
    config = detector_config(settings, cpu_side)
    return Trainer(config, world_of(settings), ShardSet(config.data.shards, "train"), None)
