"""A folder or a zip file, in one part or several, read by relative path."""

import hashlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dataio.core.errors import UserError
from dataio.sources.split_zip import is_zip, open_zip

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_FILE_BYTES = 512 * 2**20  # of one unpacked file; images are smaller
IDENTITY_BYTES = 16


def check_file_size(size: int) -> None:
    """Raise an OSError for a file too large to be an image."""
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size} bytes, expected an image of at most {MAX_FILE_BYTES}")


def identity_of(data: bytes) -> bytes:
    """What a file is known by wherever it is: 16 bytes, BLAKE2b of its own."""
    # 64 bits would give two of 10^10 images the same one.
    return hashlib.blake2b(data, digest_size=IDENTITY_BYTES).digest()


def read_file(path: str | Path) -> bytes:
    """Return the bytes of a plain file.

    Raises:
        OSError: it is missing, cannot be read, or is too large; or it is a pipe or device,
            which might never end.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a zero byte in the name
        raise OSError(str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError("neither a file nor a folder")
    check_file_size(status.st_size)
    with open(path, "rb") as file:
        return file.read(MAX_FILE_BYTES)


class Source:
    """A folder or a zip file, read by relative path with forward slashes.

    Can be sent to other processes: a zip is opened once in each of them.

    Args:
        path: the folder or zip; of a zip in parts, the `.zip` or the `.zip.001`.
        field: the argument that named it, for messages.

    Raises:
        UserError: the path does not exist, or is neither a folder nor a zip.
    """

    def __init__(self, path: str | Path, field: str = "source") -> None:
        self.path, self.field = Path(path), field
        if not self.path.exists():
            raise UserError("no such file or folder", field=field, value=path)
        self.is_zip = self.path.is_file()
        if self.is_zip and not is_zip(self.path):
            part = re.search(r"\.z\d\d+$|\.zip\.\d+$", self.path.name, re.IGNORECASE)
            hint = (
                "a part of an archive; give its .zip, or its .zip.001"
                if part
                else "neither a folder nor a zip file"
            )
            raise UserError(hint, field=field, value=path)
        self._zip: zipfile.ZipFile | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "field": self.field, "is_zip": self.is_zip, "_zip": None, "_owner": 0}

    def _archive(self) -> zipfile.ZipFile:
        # A file position shared with a forked parent would give garbage.
        if self._zip is None or self._owner != os.getpid():
            try:
                self._zip, self._owner = open_zip(self.path, self.field), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"cannot be read as a zip ({error}); copy it again", field=self.field, value=self.path
                ) from None
        return self._zip

    def files(self) -> Iterator[str]:
        """Relative paths of all files, sorted within each folder; hidden ones left out."""
        if self.is_zip:
            names = sorted(name for name in self._archive().namelist() if not name.endswith("/"))
            unsafe = [name for name in names if name.startswith("/") or ".." in name.split("/")]
            if unsafe:
                raise UserError(
                    f"unsafe zip: member {unsafe[0]!r} has a name that leads out of it; make the zip again",
                    field=self.field,
                    value=self.path,
                )
            yield from (
                n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))
            )
        else:
            yield from self._walk("")

    def _walk(self, folder: str) -> Iterator[str]:
        try:
            with os.scandir(self.path / folder) as entries:
                children = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
        except OSError as error:
            raise UserError(f"{self.path / folder}: cannot be read ({error.strerror})") from None
        for name, is_folder in children:
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                yield from self._walk(path)
            else:
                yield path

    def has(self, path: str) -> bool:
        """Whether there is a file of this path, hidden or not."""
        if self.is_zip:
            return not path.endswith("/") and path in self._archive().NameToInfo
        return os.path.isfile(self.path / path)  # false too for a name that no file can have

    def size(self, path: str) -> int:
        """The size of one file as its directory says, bytes.

        Raises:
            OSError: it is missing.
        """
        if not self.is_zip:
            return (self.path / path).stat().st_size
        try:
            return self._archive().getinfo(path).file_size
        except KeyError as error:
            raise OSError(f"{path}: not in the zip") from error

    def read(self, path: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            OSError: it is missing or cannot be read, in a folder and in a zip alike.
        """
        if not self.is_zip:
            return read_file(self.path / path)
        try:
            check_file_size(self._archive().getinfo(path).file_size)  # zipfile unpacks no more than this
            return self._archive().read(path)
        # RuntimeError: encrypted. NotImplementedError: a compression that Python lacks.
        except (
            KeyError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise OSError(f"{path}: cannot be read from the zip ({error})") from error

    def read_original(self, path: str) -> tuple[bytes, bytes]:
        """What `read` gives, and the `identity_of` the file that it was made from.

        Raises:
            OSError: see `read`.
        """
        data = self.read(path)
        return data, identity_of(data)
