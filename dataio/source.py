"""A folder or a zip file, read by relative path."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from dataio.errors import UserError


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
            yield from (
                n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))
            )
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
