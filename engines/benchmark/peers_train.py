"""How others train the same network, written as their users write it, for the benchmark.

torchvision's reference loop (references/classification/train.py) and timm's published one
(train.py of pytorch-image-models), each with its own loader and optimiser, reduced to what a step
does: no mixup, no averaging, no accumulation, as our case has none.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataio.loading.config import DataConfig
from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import READY, BenchmarkSettings, Run, Unavailable, timed
from engines.benchmark.detector import detector_config, synchronize
from engines.benchmark.peers_input import MEAN, STD, Files, transform_of
from models.detector.dual_head import DualHead

Step = Callable[[torch.Tensor, torch.Tensor], int]


def _random_crop(data: DataConfig) -> Any:
    from torchvision import transforms as t

    if data.crop == "random_resized":
        return t.RandomResizedCrop(data.size, scale=data.scale, antialias=True)
    return t.RandomCrop(data.size)


def _on_memory(step: Step, settings: BenchmarkSettings) -> Callable[[], Run]:
    """Steps on one batch that is on the device."""
    config = detector_config(settings)
    batch, side = config.train.global_batch, config.data.size
    image = torch.randn(batch, 3, side, side, device=settings.device)
    label = torch.zeros(batch, dtype=torch.int64, device=settings.device)

    def once() -> Run:
        images, seconds = timed(lambda: step(image, label), settings.seconds)
        synchronize(settings)
        return Run(images, seconds)

    return once


def _on_loader(step: Step, loader: Any, settings: BenchmarkSettings) -> Callable[[], Run]:
    """Steps on a loader's batches, over its epochs."""
    batches = (batch for _ in itertools.count() for batch in loader)

    def work() -> int:
        image, label = next(batches)
        return step(image, label)

    def once() -> Run:
        images, seconds = timed(work, settings.seconds, ready=READY)
        synchronize(settings)
        return Run(images, seconds, untimed=READY * detector_config(settings).train.global_batch)

    return once


# ---- torchvision ------------------------------------------------------------------------------


def _torchvision_step(settings: BenchmarkSettings) -> Step:
    """Torchvision's recipe: autocast on a GPU, cross-entropy, SGD, the loss looked at in every step."""
    config = detector_config(settings)
    torch.manual_seed(0)
    torch.set_num_threads(config.train.threads)
    labels = ShardSet(config.data.shards, "train").labels
    model = DualHead(config.model, labels.generators, labels.objects).train().to(settings.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    gpu = settings.device == "cuda"

    def step(image: torch.Tensor, label: torch.Tensor) -> int:
        image = image.to(settings.device, non_blocking=True)
        label = label.to(settings.device, non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            generator, _ = model(image)
            loss = nn.functional.cross_entropy(generator, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        return len(image)

    return step


@contextmanager
def step_torchvision(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    yield _on_memory(_torchvision_step(settings), settings)


@contextmanager
def train_torchvision(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """Torchvision's training loop over loose files, with torch's DataLoader."""
    config = detector_config(settings)
    transform: Any = transform_of("large")
    transform.transforms[0] = _random_crop(config.data)
    loader = torch.utils.data.DataLoader(
        Files(Path(settings.folder) / "large-files", transform),
        config.train.global_batch,
        shuffle=True,
        num_workers=settings.workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="fork",
        pin_memory=settings.device == "cuda",
    )
    yield _on_loader(_torchvision_step(settings), loader, settings)


# ---- timm -------------------------------------------------------------------------------------


def _timm() -> Any:
    try:
        import timm
        import timm.data
        import timm.optim
    except ImportError:
        raise Unavailable("timm is not installed: pip install telltale[timm]") from None
    return timm


def _timm_step(settings: BenchmarkSettings) -> Step:
    """Timm's `train_one_epoch`, as with --amp --amp-dtype bfloat16 --channels-last on a GPU."""
    timm, config = _timm(), detector_config(settings)
    torch.manual_seed(0)
    torch.set_num_threads(config.train.threads)
    classes = len(ShardSet(config.data.shards, "train").labels.generators)
    gpu = settings.device == "cuda"
    model = timm.create_model(config.model.backbone, num_classes=classes).to(settings.device)
    if gpu:
        model = model.to(memory_format=torch.channels_last)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
    loss_of = nn.CrossEntropyLoss().to(settings.device)
    model.train()
    optimizer.zero_grad()

    def step(image: torch.Tensor, label: torch.Tensor) -> int:
        if gpu:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = loss_of(model(image), label)
        loss.backward()
        optimizer.step()
        loss.item()  # its meter's update
        optimizer.zero_grad()
        return len(image)

    return step


@contextmanager
def step_timm(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    yield _on_memory(_timm_step(settings), settings)


@contextmanager
def train_timm(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """Timm's loop over loose files, with `timm.data.create_loader` (on a GPU: and its prefetcher)."""
    timm, config = _timm(), detector_config(settings)
    files = Files(Path(settings.folder) / "large-files", None)
    loader = timm.data.create_loader(
        files,
        input_size=(3, config.data.size, config.data.size),
        batch_size=config.train.global_batch,
        is_training=True,
        scale=config.data.scale,
        color_jitter=0.0,
        mean=MEAN,
        std=STD,
        num_workers=settings.workers,
        pin_memory=settings.device == "cuda",
        use_prefetcher=settings.device == "cuda",
        device=torch.device(settings.device),
    )
    if config.data.crop != "random_resized":
        files.transform.transforms[0] = _random_crop(config.data)
    yield _on_loader(_timm_step(settings), loader, settings)
