"""Benchmark cases of the model's side: the step alone, training from shards, evaluation."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataio.index import ShardSet
from dataio.loader import DataConfig, Loader, evaluation_work
from engines.benchmark import Group, Run, Settings, timed
from engines.benchmark_peers import Files, transform_of
from engines.config import Config, OptimConfig, RunConfig, TrainConfig
from engines.inference import forward
from engines.process import World
from engines.trainer import Trainer
from models.dual_head import DualHead, ModelConfig
from models.flops import peak_flops

# What two cores can train within a benchmark; a GPU gets ResNet-50 at 224 px.
CPU_SIDE, CPU_BATCH = 96, 32


def _config(settings: Settings) -> Config:
    gpu = settings.device == "cuda"
    data = DataConfig(
        shards=str(Path(settings.folder) / "large"),
        size=224 if gpu else CPU_SIDE,
        crop="random_resized" if gpu else "random",
        scale=(0.5, 1.0),
        eval_crop=0.875 if gpu else CPU_SIDE / 256,
        threads=0 if gpu else settings.workers,
    )
    batch = settings.batch if gpu else CPU_BATCH
    return Config(
        run=RunConfig(dir=settings.folder),
        data=data,
        model=ModelConfig(backbone="resnet50" if gpu else "resnet18"),
        optim=OptimConfig(lr=0.01),
        train=TrainConfig(
            steps=10**8, global_batch=batch, micro_batch=batch, threads=1 if gpu else settings.workers
        ),
    )


def _world(settings: Settings) -> World:
    device = torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu")
    return World(0, 1, 0, device, False)


def _synchronize(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def _trainer(settings: Settings) -> Trainer:
    config = _config(settings)
    return Trainer(config, _world(settings), ShardSet(config.data.shards, "train"), None)


def _steps(trainer: Trainer, settings: Settings) -> Callable[[], Run]:
    def once() -> Run:
        trainer.data_wait = 0.0

        def work() -> int:
            trainer.train_step()
            return trainer.config.train.global_batch

        images, seconds = timed(work, settings.seconds)
        _synchronize(settings)
        flops = images / seconds * trainer.flops_per_image
        extra = {"data_wait_share": trainer.data_wait / seconds, "TFLOP_per_second": flops / 1e12}
        if settings.device == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(0), trainer.precision)
            extra |= {"MFU": flops / peak} if peak else {}
        return Run(images, seconds, extra=extra)

    return once


@contextmanager
def _train_ours(settings: Settings) -> Iterator[Callable[[], Run]]:
    yield _steps(_trainer(settings), settings)


@contextmanager
def _step_ours(settings: Settings) -> Iterator[Callable[[], Run]]:
    trainer = _trainer(settings)
    batch = next(trainer._batches())
    trainer._loader = itertools.repeat(batch)
    yield _steps(trainer, settings)


def _plain_model(settings: Settings) -> tuple[DualHead, torch.optim.Optimizer, DataConfig, int]:
    config = _config(settings)
    torch.manual_seed(0)
    torch.set_num_threads(config.train.threads)
    labels = ShardSet(config.data.shards, "train").labels
    model = DualHead(config.model, labels.generators, labels.objects).train().to(settings.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    return model, optimizer, config.data, config.train.global_batch


def _plain_step(
    model: DualHead,
    optimizer: torch.optim.Optimizer,
    image: torch.Tensor,
    label: torch.Tensor,
    settings: Settings,
) -> int:
    """Torchvision's recipe: autocast on a GPU, cross-entropy, SGD, the loss looked at in every step."""
    gpu = settings.device == "cuda"
    image, label = image.to(settings.device, non_blocking=True), label.to(settings.device, non_blocking=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
        generator, _ = model(image)
        loss = nn.functional.cross_entropy(generator, label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    return len(image)


def _two(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0], batch[1]


@contextmanager
def _train_plain(settings: Settings) -> Iterator[Callable[[], Run]]:
    """Torchvision's training loop over loose files, with its DataLoader."""
    from torchvision import transforms as t

    model, optimizer, data, batch = _plain_model(settings)
    transform: Any = transform_of("large")
    transform.transforms[0] = (
        t.RandomResizedCrop(data.size, scale=data.scale, antialias=True)
        if data.crop == "random_resized"
        else t.RandomCrop(data.size)
    )
    files = Files(Path(settings.folder) / "large-files", transform)
    loader = torch.utils.data.DataLoader(
        files,
        batch,
        shuffle=True,
        num_workers=settings.workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="fork",
        pin_memory=settings.device == "cuda",
    )
    batches = (loaded for _ in itertools.count() for loaded in loader)

    def once() -> Run:
        images, seconds = timed(
            lambda: _plain_step(model, optimizer, *_two(next(batches)), settings), settings.seconds
        )
        _synchronize(settings)
        return Run(images, seconds)

    yield once


@contextmanager
def _step_plain(settings: Settings) -> Iterator[Callable[[], Run]]:
    model, optimizer, data, batch = _plain_model(settings)
    image, label = torch.randn(batch, 3, data.size, data.size), torch.zeros(batch, dtype=torch.int64)

    def once() -> Run:
        images, seconds = timed(
            lambda: _plain_step(model, optimizer, image, label, settings), settings.seconds
        )
        _synchronize(settings)
        return Run(images, seconds)

    yield once


# ---- evaluation -----------------------------------------------------------------------------


@torch.inference_mode()
def _predicting(settings: Settings, *, load: bool, predict: bool) -> Callable[[], Run]:
    config, world = _config(settings), _world(settings)
    torch.set_num_threads(config.train.threads)
    shards = ShardSet(config.data.shards, "train")
    model = DualHead(config.model, shards.labels.generators, shards.labels.objects).eval()
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = "bf16" if settings.device == "cuda" else "fp32"
    batch = 4 * config.train.micro_batch

    def loaded() -> Iterator[Any]:
        work = evaluation_work(shards, config.data, batch=batch, rank=0, world=1)
        return iter(Loader(shards, config.data, work, batch=batch, device=world.device, train=False))

    image = next(loaded()).image

    @torch.inference_mode()
    def work() -> int:
        if not load:
            forward(model, image, precision)
            return len(image)
        count = 0
        for each in loaded():
            if predict:
                forward(model, each.image, precision)[0].softmax(1).cpu()
            count += len(each.image)
        return count

    def once() -> Run:
        images, seconds = timed(work, settings.seconds)
        _synchronize(settings)
        return Run(images, seconds)

    return once


def _evaluation(*, load: bool, predict: bool) -> Any:
    @contextmanager
    def case(settings: Settings) -> Iterator[Callable[[], Run]]:
        yield _predicting(settings, load=load, predict=predict)

    return case


step = Group(
    "step",
    "forward, backward and update on images in memory (CPU: ResNet-18, 96 px; GPU: ResNet-50, 224 px, bf16)",
    "images",
    {"telltale": _step_ours, "torchvision's recipe": _step_plain},
)
train = Group(
    "train",
    "the same from shards, or from files",
    "images",
    {"telltale": _train_ours, "torchvision's recipe, DataLoader": _train_plain},
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
