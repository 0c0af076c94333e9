"""What the layouts share: reading a folder or a zip, and reporting misfits."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from dataio.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LITTER = (".txt", ".csv", ".json", ".md", ".ini", ".db", ".xml", ".html", ".zip", ".log")


class Source:
    """A folder or a zip file, read by relative path with forward slashes.

    Can be sent to other processes: a zip is opened once in each of them.

    Raises:
        UserError: the path does not exist, or is neither a folder nor a zip.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"--source {path}: no such file or folder")
        self.is_zip = self.path.is_file()
        if self.is_zip and not zipfile.is_zipfile(self.path):
            raise UserError(f"--source {path}: neither a folder nor a zip file")
        self._zip: zipfile.ZipFile | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "is_zip": self.is_zip, "_zip": None, "_owner": 0}

    def _archive(self) -> zipfile.ZipFile:
        # A file position shared with a forked parent would give garbage.
        if self._zip is None or self._owner != os.getpid():
            self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return self._zip

    def files(self) -> Iterator[str]:
        """Relative paths of all files, sorted within each folder; hidden ones left out."""
        if self.is_zip:
            names = sorted(name for name in self._archive().namelist() if not name.endswith("/"))
            yield from (n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/")))
        else:
            yield from self._walk("")

    def _walk(self, folder: str) -> Iterator[str]:
        try:
            with os.scandir(self.path / folder) as entries:
                found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
        except OSError as error:
            raise UserError(f"{self.path / folder}: cannot be read ({error.strerror})") from None
        for name, is_folder in found:
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                yield from self._walk(path)
            else:
                yield path

    def read(self, path: str) -> bytes:
        """The bytes of one file."""
        if self.is_zip:
            return self._archive().read(path)
        return (self.path / path).read_bytes()


def is_litter(name: str) -> bool:
    """Whether a file beside the images is surely none of them."""
    return name.lower().endswith(_LITTER)


class Misfits:
    """Collects files that fit no pattern: an error listing the first ten, or a skip list."""

    def __init__(self, source: str | Path, expected: str, skip: bool) -> None:
        self.source, self.expected, self.skip = source, expected, skip
        self.skipped: list[tuple[str, str]] = []
        self._count = 0
        self._first: list[str] = []

    def add(self, path: str, reason: str) -> None:
        if self.skip:
            self.skipped.append((path, reason))
            return
        self._count += 1
        if len(self._first) < 10:
            self._first.append(f"{path} ({reason})")

    def check(self) -> None:
        """Raise a UserError if there were any and they are not to be skipped."""
        if self._count:
            raise UserError(
                f"--source {self.source}: {self._count} files fit no pattern of this layout, expected {self.expected}; "
                f"first: {'; '.join(self._first)}. Remove them, or set them aside with --skip-unknown"
            )
