"""Benchmark cases of the input side: sharding, reading, decoding, loading."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dataio.images.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.loading.config import DataConfig
from dataio.loading.in_memory import preload
from dataio.loading.open_loader import open_loader
from dataio.loading.training_order import TrainingOrder, training_specs
from dataio.sharding.job import write_shards
from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import READY, BenchmarkSettings, Group, Run, timed
from engines.benchmark.peers_input import (
    by_pillow,
    by_torchvision,
    bytes_in,
    dali_reader,
    read_webdataset,
    shard_reference,
    shard_webdataset,
    torch_loading,
    webdataset_loading,
)

# ---- sharding: originals of 320 px to JPEG of 256 px ----------------------------------------


@contextmanager
def _shard_ours(
    settings: BenchmarkSettings, workers: int = 0, preset: str = "default"
) -> Iterator[Callable[[], Run]]:
    layout = GenImageLayout(Path(settings.folder) / "source", val_fraction=0.1)

    def once() -> Run:
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            _, seconds = timed(
                lambda: _count(
                    write_shards(
                        layout,
                        Path(folder) / "out",
                        preset_policy(preset, 256),
                        workers=workers or settings.workers,
                        samples_per_shard=100,
                        quiet=True,
                        allow_duplicates=True,
                    )
                ),
                0,
            )
            return Run(settings.images, seconds, bytes_in(Path(folder)))

    yield once


@contextmanager
def _shard_ours_plain(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    with _shard_ours(settings, preset="reference") as once:
        yield once


@contextmanager
def _shard_ours_alone(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    with _shard_ours(settings, workers=1) as once:
        yield once


def _count(manifest: dict[str, Any]) -> int:
    return sum(split["samples"] for split in manifest["splits"].values())


# ---- order, index and bytes, without decoding; small images, one process ----------------------


def _order(settings: BenchmarkSettings, name: str, config: DataConfig) -> TrainingOrder:
    return TrainingOrder(ShardSet(Path(settings.folder) / name, "train"), config, 0, settings.batch)


@contextmanager
def _read_ours(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    order = _order(settings, "small", _small_config())
    step = 0

    def once() -> Run:
        read = 0

        def work() -> int:
            nonlocal step, read
            work = order.work(step, 0, settings.batch)
            read += sum(data.nbytes for data in order.shards.read_many(work.ids))
            step += 1
            return settings.batch

        images, seconds = timed(work, settings.seconds)
        return Run(images, seconds, read)

    yield once


# ---- decoding: JPEG of 256 px to RGB, one thread ----------------------------------------------


def _decoder(decode: Callable[[bytes], Any]) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        shards = ShardSet(Path(settings.folder) / "large", "train")
        files = [shards.read(number).tobytes() for number in range(min(len(shards), 256))]

        def once() -> Run:
            read = 0

            def work() -> int:
                nonlocal read
                for data in files:
                    decode(data)
                    read += len(data)
                return len(files)

            images, seconds = timed(work, settings.seconds)
            return Run(images, seconds, read)

        yield once

    return case


def _by_simplejpeg(data: bytes) -> Any:
    import simplejpeg

    return simplejpeg.decode_jpeg(data)


decode_simplejpeg = _decoder(_by_simplejpeg)
decode_pillow = _decoder(by_pillow)
decode_torchvision = _decoder(by_torchvision)


@contextmanager
def decode_dali(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """The loader with a centre crop of the whole image: decoding, and what it costs to normalise."""
    config = DataConfig(size=256, crop="centre", eval_crop=1.0, threads=1)
    with loading(settings, "large", config) as once:
        yield once


# ---- loading: 256 px JPEG to a 224 px tensor, cropped at random, resized, flipped, normalised -----


def large_config(threads: int = 0) -> DataConfig:
    return DataConfig(size=224, crop="random_resized", scale=(0.5, 1.0), threads=threads)


def _small_config(threads: int = 0, *, resident: bool = False) -> DataConfig:
    return DataConfig(size=32, crop="random", pad=4, eval_crop=1.0, threads=threads, resident=resident)


@contextmanager
def loading(settings: BenchmarkSettings, name: str, config: DataConfig) -> Iterator[Callable[[], Run]]:
    """Training's batches of the shards `name` as fast as they come."""
    order = _order(settings, name, config)
    device = torch.device(settings.device)
    work = training_specs(order, micro_batch=settings.batch, rank=0, world=1, first_step=0, last_step=10**9)
    in_memory = preload(config, device, order.shards)[0] if config.resident else None
    loader = open_loader(
        order.shards, config, work, batch=settings.batch, device=device, train=True, in_memory=in_memory
    )
    extra = {} if in_memory is None else {"fill_seconds": in_memory.seconds}

    def once() -> Run:
        def work() -> int:
            return len(next(loader).image)

        images, seconds = timed(work, settings.seconds, ready=READY)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return Run(images, seconds, extra=extra, untimed=READY * settings.batch)

    yield once


@contextmanager
def _load_ours(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    with loading(settings, "large", large_config(settings.workers + 1)) as once:  # as data.threads 0
        yield once


@contextmanager
def _load_small_ours(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    with loading(settings, "small", _small_config(settings.workers + 1)) as once:
        yield once


@contextmanager
def _load_small_resident(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """Decoded once beforehand (`fill_seconds`), which is not in the rates; one thread."""
    with loading(settings, "small", _small_config(settings.workers, resident=True)) as once:
        yield once


shard = Group(
    "shard",
    "originals of 320 px to shards of JPEG, 256 px",
    "images",
    {
        "telltale": _shard_ours,
        "telltale, 1 process": _shard_ours_alone,
        "telltale, the reference's codec": _shard_ours_plain,
        "reference (Pillow, 1 process)": shard_reference,
        "webdataset.ShardWriter, Pillow pool": shard_webdataset,
    },
)
read = Group(
    "read",
    "order, index and bytes of 32 px images, one process",
    "images",
    {"telltale": _read_ours, "webdataset, shuffle 1000": read_webdataset},
)
decode = Group(
    "decode",
    "JPEG of 256 px, one thread",
    "images",
    {
        "telltale (DALI, with normalisation)": decode_dali,
        "simplejpeg": decode_simplejpeg,
        "Pillow": decode_pillow,
        "torchvision": decode_torchvision,
    },
)
load = Group(
    "load",
    "256 px JPEG to 224 px tensors, random resized crop and flip",
    "images",
    {
        "telltale": _load_ours,
        "DataLoader, Pillow, files": torch_loading("large"),
        "webdataset, Pillow": webdataset_loading("large", "pillow"),
        "webdataset, torchvision": webdataset_loading("large", "torchvision"),
        "DALI's WebDataset reader": dali_reader,
    },
)
load_small = Group(
    "load-small",
    "32 px JPEG to tensors, random crop with padding and flip",
    "images",
    {
        "telltale, held decoded (data.resident)": _load_small_resident,
        "telltale, decoding (DALI)": _load_small_ours,
        "DataLoader, Pillow, files": torch_loading("small"),
        "webdataset, Pillow": webdataset_loading("small", "pillow"),
    },
)
GROUPS = {group.name: group for group in (shard, read, decode, load, load_small)}
