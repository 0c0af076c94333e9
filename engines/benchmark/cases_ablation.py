"""Benchmark cases of single techniques: training from shards, each time with one thing changed.

The ratios say what a technique is worth on this machine, the useless ones too. Not among `all`.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dataio.loading.loader import Loader
from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import BenchmarkSettings, Case, Group, Run
from engines.benchmark.cases_train import training_steps
from engines.benchmark.detector import detector_config, world_of
from engines.config.detector import Config
from engines.train.trainer import Trainer

Change = Callable[[Config], Config]


def _data(**changes: Any) -> Change:
    return lambda config: replace(config, data=replace(config.data, **changes))


def _train(**changes: Any) -> Change:
    return lambda config: replace(config, train=replace(config.train, **changes))


def _built(settings: BenchmarkSettings, change: Change) -> Trainer:
    config = change(detector_config(settings))
    return Trainer(config, world_of(settings), ShardSet(config.data.shards, "train"), None)


def _with(change: Change = lambda config: config) -> Case:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        # As a run does; see engines/train/loop.py.
        trainer = _built(settings, change)
        gc.collect()
        gc.freeze()
        yield training_steps(trainer, settings)

    return case


@contextmanager
def _unfrozen(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    yield training_steps(_built(settings, lambda config: config), settings)


@contextmanager
def _whole_images(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """All of each image is decoded, then cropped, as with padding."""
    trainer = _built(settings, lambda config: config)
    config = trainer.config
    loader = Loader(
        trainer.train_set,
        config.data,
        trainer.data.training_specs(trainer.step, trainer.schedule.total_steps),
        batch=config.train.micro_batch,
        device=trainer.world.device,
        train=True,
        whole_images=True,
    )
    trainer.use_batches(loader)
    yield training_steps(trainer, settings)


@contextmanager
def _waiting(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """The host looks at a loss in every step."""
    trainer = _built(settings, lambda config: config)
    step = trainer.train_step

    def train_step() -> None:
        step()
        trainer.meters.sum().item()

    trainer.train_step = train_step  # type: ignore[method-assign]
    yield training_steps(trainer, settings)


def _other_precision(config: Config) -> Config:
    """fp32 where bf16 is usual, and the other way about."""
    return _train(precision="fp32" if torch.cuda.is_available() else "bf16")(config)


worth = Group(
    "worth",
    "training from shards, one thing changed at a time (CPU: ResNet-18, 96 px; GPU: ResNet-50, 224 px)",
    "images",
    {
        "telltale": _with(),
        "activations not channels-last": _with(_train(channels_last=False)),
        "torch.compile": _with(_train(compile=True)),
        "one batch ahead": _with(_data(prefetch=1)),
        "four batches ahead": _with(_data(prefetch=4)),
        "whole images decoded": _whole_images,
        "a decoding thread": _with(_data(threads=1)),
        "no hardware decoder (GPU)": _with(_data(hw_decoder_load=0.0)),
        "hardware decoder 0.65 (GPU)": _with(_data(hw_decoder_load=0.65)),
        "weights averaged": _with(_train(ema=0.999)),
        "host waits in each step": _waiting,
        "garbage collector not frozen": _unfrozen,
        "fp32 on a GPU, bf16 on a CPU": _with(_other_precision),
    },
)
GROUPS = {worth.name: worth}
