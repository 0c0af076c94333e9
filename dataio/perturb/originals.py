"""The original images of a split, chosen once and transformed by a view while they are sharded."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataio.core.errors import UserError
from dataio.layouts.base import Layout, Record
from dataio.perturb.aligned_views import View
from dataio.shards.shard_set import ShardSet
from dataio.sources.source import Source


class KeptSource(Source):
    """One split of shards with codec preset keep, read by the path of each image's source."""

    def __init__(self, folder: str | Path, split: str) -> None:
        self.path, self.field, self.split = Path(folder), "shards", split
        self._folder = folder  # or a URL
        self._set: ShardSet | None = None
        self._rows: dict[str, int] = {}
        preset = self._shards().manifest["codec"]["preset"]
        if preset != "keep":
            raise UserError(
                f"its codec preset is {preset}, so the originals are gone; give shards written with codec preset "
                "keep, or a layout and its source",
                field="shards",
                value=folder,
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_set": None, "_rows": {}}

    def _shards(self) -> ShardSet:
        if self._set is None:
            self._set = ShardSet(self._folder, self.split)
        return self._set

    def describe(self) -> list[dict[str, object]]:
        """The members' JSON, in shard order."""
        shards = self._shards()
        return [shards.about(number) for number in range(len(shards))]

    def files(self) -> Iterator[str]:
        return iter([str(about["source"]) for about in self.describe()])

    def has(self, path: str) -> bool:
        return path in self._index()

    def _index(self) -> dict[str, int]:
        if not self._rows:
            self._rows = {path: number for number, path in enumerate(self.files())}
        return self._rows

    def head(self, path: str, count: int) -> bytes:
        return self.read(path)[:count]

    def read(self, path: str) -> bytes:
        return self.read_original(path)[0]

    def read_original(self, path: str) -> tuple[bytes, bytes]:
        shards, number = self._shards(), self._index()[path]
        return shards.read(number).tobytes(), shards.identities(np.array([number]))[0].tobytes()


class KeptLayout:
    """Shards of originals as a layout of one split; see `dataio.layouts.base.Layout`.

    Raises:
        UserError: no shards, no images in the split, or another codec preset than keep.
    """

    name = "shards"
    object_in_json = "name"

    def __init__(self, folder: str | Path, split: str) -> None:
        self.root, self.split = str(folder), split
        self.source: Source = KeptSource(folder, split)
        self._shards = ShardSet(folder, split)
        self.generators, self.objects = self._shards.labels.generators, self._shards.labels.objects
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def records(self) -> Iterator[Record]:
        subsets = self._shards.manifest["subsets"]
        assert isinstance(self.source, KeptSource)
        for row, about in zip(self._shards.rows, self.source.describe(), strict=True):
            label = int(row["object"])
            generator = self.generators[int(row["generator"])]
            known = None if label < 0 else label
            subset = subsets[int(row["subset"])]
            yield Record(str(about["source"]), generator, known, self.split, subset)

    def read(self, path: str) -> bytes:
        return self.source.read(path)


class ViewedSource(Source):
    """A source whose files are transformed by a view.

    Args:
        photographs: paths of the photographs.
    """

    def __init__(self, source: Source, view: View, photographs: frozenset[str]) -> None:
        self.path, self.field = source.path, source.field
        self._source, self._view, self._photographs = source, view, photographs

    def __getstate__(self) -> dict[str, object]:
        return dict(vars(self))

    def files(self) -> Iterator[str]:
        return self._source.files()

    def has(self, path: str) -> bool:
        return self._source.has(path)

    def head(self, path: str, count: int) -> bytes:
        return self.read(path)[:count]

    def read(self, path: str) -> bytes:
        return self.read_original(path)[0]

    def read_original(self, path: str) -> tuple[bytes, bytes]:
        """The view's file, and the identity of the original, which all views share."""
        original, identity = self._source.read_original(path)
        return self._view(original, path, path in self._photographs), identity


@dataclass(frozen=True)
class Originals:
    """The images of one split that a protocol evaluates; the same in every cell.

    Attributes:
        layout: where they come from. records: the chosen ones.
    """

    layout: Layout
    records: list[Record] = field(repr=False)

    def sources(self, *, fakes_only: bool = False, limit: int = 0) -> Iterable[bytes]:
        """Bytes of the chosen images that can be read, or of the first `limit` of them."""
        chosen = [r for r in self.records if not fakes_only or r.generator != self.layout.generators[0]]
        for record in chosen[: limit or None]:
            try:
                yield self.layout.read(record.path)
            except OSError:
                continue

    def through(self, view: View) -> "ViewedLayout":
        return ViewedLayout(self, view)


class ViewedLayout:
    """The chosen originals as a layout whose `read` gives what a view makes of them."""

    def __init__(self, originals: Originals, view: View) -> None:
        inner = originals.layout
        self.name, self.root = inner.name, inner.root
        self.generators, self.objects = inner.generators, inner.objects
        self.object_in_json = inner.object_in_json
        self._records = originals.records
        photographs = frozenset(r.path for r in self._records if r.generator == self.generators[0])
        self.source: Source = ViewedSource(inner.source, view, photographs)
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def records(self) -> Iterator[Record]:
        return iter(self._records)

    def read(self, path: str) -> bytes:
        return self.source.read(path)


def choose_originals(layout: Layout, split: str, images: int, seed: int) -> Originals:
    """The images of a split, or a seeded subset of them that depends on their paths alone.

    Args:
        images: how many at most; 0 takes all.

    Raises:
        UserError: the split has none; see `Layout.records`.
    """
    records = (record for record in layout.records() if record.split == split)

    # Always in this order, so that the first images are a random sample of all.
    def rank(record: Record) -> bytes:
        return _rank(seed, record.path)

    chosen = heapq.nsmallest(images, records, key=rank) if images else sorted(records, key=rank)
    if not chosen:
        raise UserError(
            f"no images in the {split} split of the {layout.name} layout", field="source", value=layout.root
        )
    return Originals(layout, chosen)


def _rank(seed: int, path: str) -> bytes:
    text = f"chosen:{seed}:{path}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest()
