"""Benchmark cases of the model's side: the step alone, training from shards, evaluation."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dataio.loading.loader import Loader
from dataio.loading.training_order import evaluation_specs
from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import READY, BenchmarkSettings, Group, Run, timed
from engines.benchmark.detector import detector_config, make_trainer, synchronize, world_of
from engines.benchmark.peers_train import step_timm, step_torchvision, train_timm, train_torchvision
from engines.benchmark.roofline import step_traffic
from engines.evaluate.split_inference import forward, predict_share
from engines.runtime.inference import inference_batch
from engines.train.trainer import Trainer
from models.detector.dual_head import DualHead
from models.detector.flops import peak_flops


def training_steps(trainer: Trainer, settings: BenchmarkSettings) -> Callable[[], Run]:
    """What runs a trainer for a while; its arithmetic as shares of what the device could do at best."""
    data, batch, limits = trainer.config.data, trainer.config.train.micro_batch, settings.limits
    intensity = 0.0
    if limits is not None:
        traffic = step_traffic(trainer.model, batch, data.size, trainer.precision)
        intensity = batch * trainer.flops_per_image / traffic

    def once() -> Run:
        for _ in range(READY):
            trainer.train_step()
        synchronize(settings)
        trainer.pop_data_wait()

        def work() -> int:
            trainer.train_step()
            return trainer.config.train.global_batch

        images, seconds = timed(work, settings.seconds)
        synchronize(settings)
        flops = images / seconds * trainer.flops_per_image
        extra = {"data_wait_share": trainer.pop_data_wait() / seconds, "TFLOP_per_second": flops / 1e12}
        if settings.device == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(0), trainer.precision)
            extra |= {"MFU": flops / peak} if peak else {}
        if limits is not None:
            extra["share_of_peak"] = flops / limits.flops
            extra["share_of_roofline"] = flops / limits.bound(intensity)
        return Run(images, seconds, extra=extra, untimed=READY * trainer.config.train.global_batch)

    return once


@contextmanager
def _train_ours(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    yield training_steps(make_trainer(settings), settings)


@contextmanager
def _step_ours(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    trainer = make_trainer(settings)
    trainer.use_batches(itertools.repeat(next(trainer.batches())))
    yield training_steps(trainer, settings)


# ---- evaluation -----------------------------------------------------------------------------


@torch.inference_mode()
def _predicting(settings: BenchmarkSettings, *, load: bool, predict: bool) -> Callable[[], Run]:
    config, world = detector_config(settings), world_of(settings)
    torch.set_num_threads(config.train.threads)
    shards = ShardSet(config.data.shards, "train")
    model = DualHead(config.model, shards.labels.generators, shards.labels.objects).eval()
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = "bf16" if settings.device == "cuda" else "fp32"
    batch = inference_batch(config.data.size, 4 * config.train.micro_batch, world.device)

    def loaded() -> Iterator[Any]:
        work = evaluation_specs(shards, config.data, batch=batch, rank=0, world=1)
        return iter(Loader(shards, config.data, work, batch=batch, device=world.device, train=False))

    image = next(loaded()).image

    @torch.inference_mode()
    def work() -> int:
        if not load:
            forward(model, image, precision)
            return len(image)
        if predict:
            return len(predict_share(model, config, shards, world, batch, False)[0])
        return sum(len(each.image) for each in loaded())

    def once() -> Run:
        images, seconds = timed(work, settings.seconds)
        synchronize(settings)
        return Run(images, seconds)

    return once


def _evaluation(*, load: bool, predict: bool) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        yield _predicting(settings, load=load, predict=predict)

    return case


step = Group(
    "step",
    "forward, backward and update on images in memory (CPU: ResNet-18, 96 px; GPU: ResNet-50, 224 px, bf16)",
    "images",
    {"telltale": _step_ours, "torchvision's recipe": step_torchvision, "timm's recipe": step_timm},
)
train = Group(
    "train",
    "the same from shards, or from files",
    "images",
    {
        "telltale": _train_ours,
        "torchvision's recipe, DataLoader": train_torchvision,
        "timm's recipe, create_loader": train_timm,
    },
)
evaluate = Group(
    "eval",
    "forward pass of all training images",
    "images",
    {
        "telltale": _evaluation(load=True, predict=True),
        "the loader alone": _evaluation(load=True, predict=False),
        "the model alone": _evaluation(load=False, predict=True),
    },
)
GROUPS = {group.name: group for group in (step, train, evaluate)}
