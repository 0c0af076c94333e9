"""How others shard, read and load, written as their users write it, for the benchmark.

The reference project's resizing loop, torch's DataLoader over files, the webdataset library, DALI's
own reader.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import READY, BenchmarkSettings, Run, timed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sources(settings: BenchmarkSettings) -> list[Path]:
    return [
        p
        for p in sorted((Path(settings.folder) / "source").rglob("*"))
        if p.suffix.lower() in (".png", ".jpeg")
    ]


@contextmanager
def shard_reference(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """The reference project's way: one process, Pillow, squashed to 256 x 256, JPEG files."""
    paths = _sources(settings)

    def once() -> Run:
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:

            def work() -> int:
                for number, path in enumerate(paths):
                    with Image.open(path) as image:
                        image.convert("RGB").resize((256, 256)).save(Path(folder) / f"{number}.jpg")
                return len(paths)

            images, seconds = timed(work, 0)
            return Run(images, seconds, bytes_in(Path(folder)))

    yield once


def _encoded(path: Path) -> bytes:
    with Image.open(path) as image:
        side = 256 / min(image.size)
        resized = image.convert("RGB").resize((round(image.width * side), round(image.height * side)))
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=96)
    return buffer.getvalue()


@contextmanager
def shard_webdataset(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """Webdataset's ShardWriter, with Pillow in a pool of processes."""
    import webdataset

    paths = _sources(settings)

    def once() -> Run:
        with (
            tempfile.TemporaryDirectory(dir=settings.folder) as folder,
            ProcessPoolExecutor(settings.workers) as pool,
        ):

            def work() -> int:
                with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=100, verbose=0) as writer:
                    for number, data in enumerate(pool.map(_encoded, paths, chunksize=16)):
                        writer.write({"__key__": f"{number:09d}", "jpg": data, "cls": 0})
                return len(paths)

            images, seconds = timed(work, 0)
            return Run(images, seconds, bytes_in(Path(folder)))

    yield once


def _tars(settings: BenchmarkSettings, name: str) -> list[str]:
    return sorted(map(str, (Path(settings.folder) / name / "train").glob("*.tar")))


@contextmanager
def read_webdataset(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    import webdataset

    def once() -> Run:
        read = 0

        def work() -> int:
            nonlocal read
            count = 0
            tars = _tars(settings, "small")
            for sample in webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(
                1000
            ):
                read += len(sample["jpg"])
                count += 1
            return count

        images, seconds = timed(work, settings.seconds)
        return Run(images, seconds, read)

    yield once


def by_pillow(data: bytes) -> Any:
    return np.asarray(_opened_by_pillow(data))


def _opened_by_pillow(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB")


def by_torchvision(data: bytes) -> Any:
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


class Files(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Loose JPEG files and their labels, opened with Pillow."""

    def __init__(self, folder: Path, transform: Any) -> None:
        self.labels = json.loads((folder / "labels.json").read_text())
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.folder / f"{number:06d}.jpg") as image:
            return self.transform(image.convert("RGB")), self.labels[number]


def transform_of(name: str, *, tensors: bool = False) -> Any:
    """Torchvision's transforms for the same augmentation as ours, of Pillow images or uint8 tensors."""
    from torchvision import transforms as t

    convert = t.ConvertImageDtype(torch.float32) if tensors else t.ToTensor()
    crop = (
        t.RandomResizedCrop(224, scale=(0.5, 1.0), antialias=True)
        if name == "large"
        else t.RandomCrop(32, padding=4)
    )
    return t.Compose([crop, t.RandomHorizontalFlip(), convert, t.Normalize(MEAN, STD)])


def torch_loading(name: str) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        files = Files(Path(settings.folder) / f"{name}-files", transform_of(name))
        loader = torch.utils.data.DataLoader(
            files,
            settings.batch,
            shuffle=True,
            num_workers=settings.workers,
            drop_last=True,
            persistent_workers=True,
            multiprocessing_context="fork",
        )
        yield _epochs(lambda: iter(loader), settings)

    return case


def _epochs(start: Callable[[], Iterator[Any]], settings: BenchmarkSettings) -> Callable[[], Run]:
    """Batches of as many epochs as it takes; an iterator goes on from run to run."""
    batches = start()

    def work() -> int:
        nonlocal batches
        batch = next(batches, None)
        while batch is None:
            batches = start()
            batch = next(batches, None)
        return len(batch[0])

    def once() -> Run:
        return Run(*timed(work, settings.seconds, ready=READY), untimed=READY * settings.batch)

    return once


def webdataset_loading(name: str, decode: str) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        import webdataset

        transform = transform_of(name, tensors=decode == "torchvision")
        names = ShardSet(Path(settings.folder) / name, "train").labels.generators
        opened = by_torchvision if decode == "torchvision" else _opened_by_pillow

        def sample(item: dict[str, Any]) -> tuple[torch.Tensor, int]:
            return transform(opened(item["jpg"])), names.index(json.loads(item["json"])["generator"])

        tars = _tars(settings, name)
        dataset = (
            webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000).map(sample)
        )
        loader = webdataset.WebLoader(
            dataset.batched(settings.batch, partial=False),
            batch_size=None,
            num_workers=min(settings.workers, len(tars)),
            multiprocessing_context="fork",
        )
        yield _epochs(lambda: iter(loader), settings)

    return case


@contextmanager
def dali_reader(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """DALI's own WebDataset reader: the order is a local shuffle, the crops are drawn by DALI."""
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types

    types: Any = dali_types
    tars = _tars(settings, "large")
    gpu = settings.device == "cuda"

    @pipeline_def(
        batch_size=settings.batch,
        num_threads=settings.workers + 1,  # as telltale
        device_id=0 if gpu else None,
        prefetch_queue_depth=2,
    )
    def pipeline() -> Any:
        encoded: Any = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=1000,
        )
        image: Any = fn.decoders.image_random_crop(
            encoded, device="mixed" if gpu else "cpu", output_type=types.RGB, random_area=[0.5, 1.0]
        )
        image = fn.resize(image, size=[224, 224], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop_mirror_normalize(
            image,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
        )

    built = pipeline()
    built.build()

    def once() -> Run:
        def work() -> int:
            (images,) = built.run()
            return len(torch.from_dlpack(images.as_tensor()))

        images, seconds = timed(work, settings.seconds, ready=READY)
        return Run(images, seconds, untimed=READY * settings.batch)

    yield once
