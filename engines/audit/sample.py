"""The stratified sample of an audit, and the reading of its images.

The sample is drawn by a hash of names, half photographs and half fakes, the fakes spread
evenly over the generators, from a layout (before sharding) or from shards.
"""

import concurrent.futures
import heapq
import json
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataio.core.counter_rng import hash_text
from dataio.core.errors import UserError
from dataio.images.opening import Undecodable
from dataio.layouts.base import SPLITS, Layout
from dataio.shards.manifest import read_manifest
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import TAR_BLOCK
from dataio.sources.remote_path import place_of
from dataio.sources.source import Source
from engines.audit.features import Measured, measure_image

_CHUNK = 32  # images sent to a worker at a time


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A reference to one image.

    Attributes:
        name: for messages. path: of the source; a shard's sample has it once it is read.
        tar: shard file, "" for a layout's own file. offset, size: of the image's bytes in it.
        origin: the subset it comes from, "" where there are none.
    """

    name: str
    generator: str
    object: int | None
    split: str
    group: str = ""
    path: str = ""
    tar: str = ""
    offset: int = 0
    size: int = 0
    origin: str = ""


@dataclass(frozen=True)
class AuditedImage:
    """A sampled image after reading: its features, or the reason why there are none."""

    ref: SampleRef
    path: str
    measured: Measured | None
    reason: str = ""


def shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    """How many images to take of each generator.

    Half are photographs ("nature"), the other half is spread evenly over the generators. Where
    one has too few images, the others of its half give more, and then the other half.

    Args:
        available: images by generator. total: size of the sample; 0 for all images.
    """
    if total == 0 or total >= sum(available.values()):
        return dict(available)
    fakes = {name: count for name, count in available.items() if name != "nature"}
    real = min(available.get("nature", 0), max(total - total // 2, total - sum(fakes.values())))
    left, taken = total - real, dict.fromkeys(available, 0)
    taken["nature"] = real
    names = sorted(fakes, key=lambda name: (fakes[name], name))
    for number, name in enumerate(names):  # the rarest first: its deficit goes to the others
        taken[name] = min(fakes[name], left // (len(names) - number))
        left -= taken[name]
    return {name: count for name, count in taken.items() if count}


class StratifiedSampler:
    """Keeps the references with the smallest hashes of each generator; their order does not matter."""

    def __init__(self, sample: int, seed: int) -> None:
        self._sample, self._seed = sample, seed
        self._kept: dict[str, list[tuple[int, str, SampleRef]]] = {}
        self.counts: Counter[tuple[str, str]] = Counter()  # of all images, by split and generator

    def offer(self, ref: SampleRef) -> None:
        self.counts[ref.split, ref.generator] += 1
        heap = self._kept.setdefault(ref.generator, [])
        entry = (-hash_text(f"{self._seed}:{ref.name}"), ref.name, ref)
        if self._sample == 0 or len(heap) < self._sample:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def chosen(self) -> list[SampleRef]:
        """The sample, by name."""
        quotas = shares({name: len(heap) for name, heap in self._kept.items()}, self._sample)
        refs = [
            ref
            for name, count in quotas.items()
            for _, _, ref in sorted(self._kept[name], key=lambda entry: (-entry[0], entry[1]))[:count]
        ]
        return sorted(refs, key=lambda ref: ref.name)


def refs_of_layout(layout: Layout) -> Iterator[SampleRef]:
    """Every record as a reference.

    Raises:
        UserError: see `Layout.records`.
    """
    for record in layout.records():
        place = (record.split, record.group, record.path)
        yield SampleRef(record.path, record.generator, record.object, *place, origin=record.subset)


def refs_of_shards(shards: Iterable[ShardSet]) -> Iterator[SampleRef]:
    """Every sample of opened splits as a reference."""
    for opened in shards:
        generators, files = opened.labels.generators, [shard["file"] for shard in opened.shards]
        subsets = opened.manifest["subsets"]
        for row in opened.rows:
            shard, label = files[int(row["shard"])], int(row["object"])
            yield SampleRef(
                f"{shard} key {int(row['key']):09d}",
                generators[int(row["generator"])],
                None if label < 0 else label,
                opened.split,
                tar=str(opened.folder / shard),
                offset=int(row["offset"]),
                size=int(row["size"]),
                origin=subsets[int(row["subset"])],
            )


def open_splits(folder: str | Path, splits: Sequence[str]) -> list[ShardSet]:
    """The splits of a shard folder that have images.

    Raises:
        UserError: see `ShardSet`; none of them has images.
    """
    entries = read_manifest(folder)["splits"]
    filled = [split for split in splits if split in entries and entries[split]["samples"]]
    if not filled:
        raise UserError(
            f"{folder} has no images there; choose another", field="split", value=" ".join(splits)
        )
    return [ShardSet(folder, split) for split in filled]


def audit_images(refs: Sequence[SampleRef], source: Source | None, workers: int) -> Iterator[AuditedImage]:
    """Read and measure images, in order, in this process or in `workers` others.

    Raises:
        UserError: a worker was killed.
    """
    chunks = [list(refs[start : start + _CHUNK]) for start in range(0, len(refs), _CHUNK)]
    if workers == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield from _audit_chunk(chunk, source)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(chunks)), context) as pool:
        try:
            for images in pool.map(_audit_chunk, chunks, [source] * len(chunks)):
                yield from images
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); try fewer", field="workers", value=workers
            ) from None


def _audit_chunk(chunk: list[SampleRef], source: Source | None) -> list[AuditedImage]:
    return [_audit_image(ref, source) for ref in chunk]


def _audit_image(ref: SampleRef, source: Source | None) -> AuditedImage:
    path = ref.path
    try:
        if source is None:
            data, path = _read_sample(ref)
        else:
            data = source.read(ref.path)
        return AuditedImage(ref, path, measure_image(data))
    except Undecodable as error:
        return AuditedImage(ref, path, None, str(error))
    except OSError as error:
        return AuditedImage(ref, path, None, f"cannot be read ({error.strerror or error})")


def _read_sample(ref: SampleRef) -> tuple[bytes, str]:
    """A sample's image, and its source's path from the JSON member that follows ("" if damaged)."""
    place = place_of(ref.tar)
    with place.open("rb") as file:
        file.seek(ref.offset)
        data = file.read(ref.size)
        file.seek(ref.offset + -(-ref.size // TAR_BLOCK) * TAR_BLOCK)
        try:
            head = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "surrogateescape")
            record: dict[str, Any] = json.loads(file.read(head.size))
            return data, str(record["source"])
        except (tarfile.TarError, ValueError, KeyError, TypeError):
            return data, ""


def balance(counts: Mapping[tuple[str, str], int], generators: Sequence[str]) -> dict[str, Any]:
    """{split: {"images", "real", "fake", "generators": {name: images}}} of all images, not the sample."""
    balances = {}
    for split in SPLITS:
        by_generator = {name: counts.get((split, name), 0) for name in generators}
        images = sum(by_generator.values())
        if images:
            real = by_generator.get("nature", 0)
            balances[split] = {
                "images": images,
                "real": real,
                "fake": images - real,
                "generators": by_generator,
            }
    return balances


def stack(images: Sequence[AuditedImage]) -> dict[str, np.ndarray]:
    """Arrays over the readable images: container, pixels [N, F]; jpeg, fake, generator, origin, group [N]."""
    good = [(image.ref, image.measured) for image in images if image.measured is not None]
    # An image without a group is a group of its own.
    groups = [ref.group or f"\0{ref.name}" for ref, _ in good]
    return {
        "container": np.array([m.container for _, m in good]),
        "pixels": np.array([m.pixels for _, m in good]),
        "jpeg": np.array([m.is_jpeg for _, m in good], bool),
        "fake": np.array([ref.generator != "nature" for ref, _ in good], bool),
        "generator": np.array([ref.generator for ref, _ in good]),
        "origin": np.array([ref.origin for ref, _ in good]),
        "group": np.unique(np.array(groups), return_inverse=True)[1],
    }
