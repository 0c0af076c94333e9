"""A folder or a zip file, in one part or several, read by relative path."""

import hashlib
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dataio.core.errors import UserError, reason_of
from dataio.sources.split_zip import is_zip, open_zip
from dataio.sources.zip_pieces import explain_no_zip, explain_piece

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


def read_file(path: str | Path, count: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of a plain file, at most the first `count`.

    Raises:
        OSError: it is missing, cannot be read, or is too large; or it is a pipe or device,
            which might never end.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a zero byte in the name
        raise OSError(str(error)) from None
    except OSError as error:
        raise _named_link(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError("neither a file nor a folder")
    check_file_size(status.st_size)
    with open(path, "rb") as file:
        return file.read(count)


def _named_link(path: str | Path, error: OSError) -> OSError:
    """The error, saying where `path` leads to if it is a link."""
    try:
        target = os.readlink(path)
    except OSError:
        return error
    return OSError(error.errno, f"a link to {target}: {reason_of(error)}")


def is_hidden(path: str) -> bool:
    """Whether a part of a path is hidden by its name, or is what macOS adds to a zip."""
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one; a link to itself does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


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
            raise UserError(explain_no_zip(self.path), field=field, value=path)
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
                text = explain_piece(self.path) or f"cannot be read as a zip ({error}); copy it again"
                raise UserError(text, field=self.field, value=self.path) from None
        return self._zip

    def files(self) -> Iterator[str]:
        """Relative paths of all files, sorted within each folder; hidden ones left out."""
        return self._list(hidden=False)

    def files_and_hidden(self) -> Iterator[str]:
        """As `files`, with those whose path has a part that begins with "." or "__MACOSX"."""
        return self._list(hidden=True)

    def _list(self, *, hidden: bool) -> Iterator[str]:
        if self.is_zip:
            names = sorted(name for name in self._archive().namelist() if not name.endswith("/"))
            unsafe = [name for name in names if name.startswith("/") or ".." in name.split("/")]
            if unsafe:
                raise UserError(
                    f"unsafe zip: member {unsafe[0]!r} has a name that leads out of it; make the zip again",
                    field=self.field,
                    value=self.path,
                )
            yield from (name for name in names if hidden or not is_hidden(name))
        else:
            yield from self._walk("", (), hidden)

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...], hidden: bool) -> Iterator[str]:
        """Files below `folder`; `above` has the device and inode of the folders that lead to it."""
        here = self.path / folder
        try:
            status = os.stat(here)
            with os.scandir(here) as entries:
                children = sorted((e.name, is_folder(e)) for e in entries if hidden or not is_hidden(e.name))
        except OSError as error:
            raise UserError(f"{here}: cannot be read ({error.strerror})") from None
        own = (status.st_dev, status.st_ino)
        if own in above:
            raise UserError(
                f"{here}: a link to {os.path.realpath(here)}, a folder above it, so that the tree never ends; "
                "remove the link"
            )
        for name, below in children:
            path = f"{folder}/{name}" if folder else name
            if below:
                yield from self._walk(path, (*above, own), hidden)
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
        with _as_os_error(path):
            check_file_size(self._archive().getinfo(path).file_size)  # zipfile unpacks no more than this
            return self._archive().read(path)

    def read_original(self, path: str) -> tuple[bytes, bytes]:
        """What `read` gives, and the `identity_of` the file that it was made from.

        Raises:
            OSError: see `read`.
        """
        data = self.read(path)
        return data, identity_of(data)

    def head(self, path: str, count: int) -> bytes:
        """Return the first bytes of one file, at most `count`.

        Raises:
            OSError: as for `read`.
        """
        if not self.is_zip:
            return read_file(os.path.join(self.path, path), count)  # a Path would keep all names in memory
        with _as_os_error(path), self._archive().open(path) as member:
            return member.read(count)

    def is_encrypted(self, path: str) -> bool:
        """Whether a member of a zip cannot be read without a password."""
        return self.is_zip and bool(self._archive().getinfo(path).flag_bits & 1)


@contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    """Raise an OSError for whatever zipfile raises for one member."""
    try:
        yield
    # RuntimeError: encrypted. NotImplementedError: a compression that Python lacks.
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise OSError(f"{path}: cannot be read from the zip ({error})") from error
