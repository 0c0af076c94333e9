"""What a layout yields: one `Record` for each image, before anything is read or encoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from dataio.sources.source import Source

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """One source image and what is known of it.

    Attributes:
        path: where the bytes are, relative to the layout's root, with forward slashes;
            inside the archive where the source is a zip.
        generator: a name from the layout's `generators`; "nature" for a photograph.
        object: an index into the layout's `objects`, or None where unknown.
        split: "train", "val" or "test".
        subset: the part of the data set the image was published in (GenImage's
            generator folder, which photographs have too); "" where there are no parts.
        group: images that must share a split carry the same group; "" means alone.
    """

    path: str
    generator: str
    object: int | None
    split: str
    subset: str = ""
    group: str = ""


class Layout(Protocol):
    """A data set on disk, seen as a stream of records.

    Attributes:
        name: the layout's name ("genimage", "cifake", "manifest", "synthetic").
        root: the folder (or zip file) that record paths are relative to.
        source: what `read` reads from; small enough to send to worker processes.
        generators: label space of the generator head; index 0 is always "nature".
        objects: label space of the object head; unique names.
        object_in_json: "index" or "name": how the member JSON writes the object.
        notes: what the user should know, a line each.
        skipped: (path, reason) of files that fit no pattern, filled by `records()`
            when the layout was opened with skip_unknown, for `rejected.csv`.
    """

    name: str
    root: str
    source: Source
    generators: tuple[str, ...]
    objects: tuple[str, ...]
    object_in_json: str
    notes: list[str]
    skipped: list[tuple[str, str]]

    def records(self) -> Iterator[Record]:
        """Yield every image once, in an order that depends on names alone.

        Raises:
            UserError: the source does not have this layout, or files fit no pattern.
        """

    def read(self, path: str) -> bytes:
        """Return the bytes of one source image; safe to call in any process."""
