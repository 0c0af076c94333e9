"""The images that benchmarks run on: loose files and shards of the same pictures."""

import json
from pathlib import Path

import numpy as np

from dataio.core.atomic import write_text
from dataio.images.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.job import write_shards
from dataio.shards.shard_set import ShardSet
from engines.benchmark.case import BenchmarkSettings

SIDES = {"large": 256, "small": 32}


def draw_images(settings: BenchmarkSettings) -> None:
    """Draw and shard what is not there yet: `source`, `large` and `small` in the settings' folder.

    source: originals of 320 px in GenImage's layout. large, small: shards of 256 and 32 px, and
    beside them `NAME-files`, the same encoded images as loose files, with labels.json.
    """
    folder = Path(settings.folder)
    write_synthetic(folder / "source", images=settings.images, size=320, workers=settings.workers)
    write_synthetic(folder / "source-small", images=settings.small, size=32, workers=settings.workers)
    for name, side in SIDES.items():
        source = folder / ("source" if name == "large" else "source-small")
        write_shards(
            GenImageLayout(source, val_fraction=0.1),
            folder / name,
            preset_policy("default", side),
            workers=settings.workers,
            samples_per_shard=200 if name == "large" else 1000,
            quiet=True,
            allow_duplicates=True,
        )
        _loose(folder / name, folder / f"{name}-files")


def _loose(shards: Path, files: Path) -> None:
    if (files / "labels.json").exists():
        return
    files.mkdir(exist_ok=True)
    opened = ShardSet(shards, "train")
    for number in range(len(opened)):
        (files / f"{number:06d}.jpg").write_bytes(opened.read(number).tobytes())
    write_text(files / "labels.json", json.dumps(np.asarray(opened.rows["generator"]).tolist()))
