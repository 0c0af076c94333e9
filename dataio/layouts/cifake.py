"""CIFAKE: {train,test}/{REAL,FAKE}/NNNN (k).jpg, from a folder or the zip as published."""

import re
from collections.abc import Iterator
from pathlib import Path

from dataio.layouts.base import Record
from dataio.layouts.files import Misfits
from dataio.layouts.registry import HALVE_TEST, register_layout
from dataio.layouts.splits import split_of
from dataio.sources.source import Source

# The class is the number in parentheses; no suffix is 1. Sorting would give another order.
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GENERATORS = ("nature", "stable_diffusion_1_4")
DEFAULT_VAL_FRACTION = 0.10
_NAME = re.compile(r"(\d{1,4})(?: \((\d{1,2})\))?\.jpe?g", re.IGNORECASE)


def labels_of_name(path: str) -> tuple[str, int | None] | None:
    """(generator, object index) as a file's folder and name give them; None for other paths."""
    parts = path.split("/")
    match = _NAME.fullmatch(parts[-1])
    if match is None or len(parts) < 2 or parts[-2].lower() not in ("real", "fake"):
        return None
    return GENERATORS[parts[-2].lower() == "fake"], int(match[2] or 1) - 1


@register_layout(
    "cifake",
    options=(HALVE_TEST,),
    val_fraction=DEFAULT_VAL_FRACTION,
    labels_of_name=labels_of_name,
    counting="files",
    codec_preset="keep",
)
class CifakeLayout:
    """See `dataio.layouts.base.Layout`. The official test is the test split; train gives val.

    Args:
        source: the folder that has train/ and test/, or the zip (one folder level around
            them is fine).
        val_fraction: share of train that becomes val. halve_test: see `split_of`.
        skip_unknown: list files that fit no pattern in `skipped` instead of failing.
    """

    name = "cifake"
    object_in_json = "name"
    generators: tuple[str, ...] = GENERATORS
    objects: tuple[str, ...] = OBJECTS

    def __init__(
        self,
        source: str | Path,
        *,
        val_fraction: float = DEFAULT_VAL_FRACTION,
        skip_unknown: bool = False,
        halve_test: bool = False,
    ) -> None:
        self.source = Source(source)
        self.root = str(source)
        self.val_fraction, self.halve_test = val_fraction, halve_test
        self._misfits = Misfits(self.name, source, "{train,test}/{REAL,FAKE}/0000 (2).jpg", skip_unknown)
        self.skipped = self._misfits.skipped
        self.notes: list[str] = []

    def records(self) -> Iterator[Record]:
        """See `dataio.layouts.base.Layout.records`."""
        count = 0
        self._misfits.clear()
        for path in self.source.files():
            parts = path.split("/")
            if self._misfits.is_litter(path):
                continue
            match = _NAME.fullmatch(parts[-1])
            folders = [part.lower() for part in parts[-3:-1]]
            if len(folders) < 2 or folders[0] not in ("train", "test") or folders[1] not in ("real", "fake"):
                self._misfits.add(path, "not in {train,test}/{REAL,FAKE}/")
                continue
            suffix = int(match[2] or 1) if match else 0
            if match is None or not 1 <= suffix <= 10:
                self._misfits.add(path, "not NNNN.jpg or NNNN (2..10).jpg")
                continue
            count += 1
            # REAL and FAKE use the same names: the folder is part of what is hashed.
            unique = f"{folders[1]}/{match[1]} ({suffix})"
            split = split_of(unique, folders[0] == "test", self.val_fraction, self.halve_test)
            yield Record(path, GENERATORS[folders[1] == "fake"], suffix - 1, split)
        self._misfits.check(count)

    def read(self, path: str) -> bytes:
        return self.source.read(path)
