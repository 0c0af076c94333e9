"""Zip archives in several parts, as GenImage is published, read without joining them first.

Two kinds are about: plain cuts of one file (`NAME.zip.001`, `.002`, as 7-Zip makes them) and
split archives (`NAME.z01`, `.z02`, ..., `NAME.zip`, as `zip -s` and WinZip make them), whose
directory gives each member's part and its place in that part. Python's zipfile reads the
first kind from one long file, and the second once those places are counted through.
"""

import io
import re
import struct
import zipfile
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from dataio.core.errors import UserError

_END = b"PK\x05\x06"  # end of central directory: APPNOTE.TXT 4.3.16
_LOCATOR = b"PK\x06\x07"  # of its zip64 form: 4.3.15
_LOCATOR_SIZE = 20
_END_SEARCH = 65_557  # its size and the longest comment


def _first_cut(path: Path) -> bool:
    """Whether the name is that of the first plain cut."""
    return re.search(r"\.zip\.0*1$", path.name, re.IGNORECASE) is not None


def is_zip(path: Path) -> bool:
    """Whether a file is a zip, or the part by which a zip of several is opened."""
    try:
        return _first_cut(path) or zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it says so of split archives in the zip64 form
        return True


class JoinedFile(io.RawIOBase):
    """Several files read as one.

    Args:
        paths: in order.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._files = [open(path, "rb") for path in paths]  # noqa: SIM115 (open as long as this is)
        ends = accumulate(path.stat().st_size for path in paths)
        self.starts = [0, *ends]  # and the end of all
        self._place = 0
        # Bytes that are to be read as others: (place, bytes).
        self.patches: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.starts[-1]}[whence]
        if base + offset < 0:
            raise OSError(22, "before the start")  # what a file says, and zipfile expects
        self._place = base + offset
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number = bisect_right(self.starts, self._place) - 1
        if number >= len(self._files):
            return 0
        length = min(len(buffer), self.starts[number + 1] - self._place)
        self._files[number].seek(self._place - self.starts[number])
        data = bytearray(self._files[number].read(length))
        for place, patch in self.patches:
            for index, byte in enumerate(patch, place - self._place):
                if 0 <= index < len(data):
                    data[index] = byte
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def open_zip(path: Path, field: str) -> zipfile.ZipFile:
    """Open a zip, with the other parts that lie beside it.

    Args:
        path: the zip, `NAME.zip.001`, or the `NAME.zip` of a split archive.
        field: the argument that named it, for messages.

    Raises:
        UserError: a part is missing. OSError, zipfile.BadZipFile: not readable as a zip.
    """
    if _first_cut(path):
        return _open_cuts(path, field)
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _END_SEARCH))
        tail = file.read()
    end_record = tail.rfind(_END)
    if end_record < 0:
        return zipfile.ZipFile(path)  # which says what is wrong
    last, directory = struct.unpack_from("<HH", tail, end_record + 4)
    if last == 0 or last == 0xFFFF:
        return zipfile.ZipFile(path)
    return _open_split(path, field, last, directory, size - len(tail) + end_record)


def _open_cuts(path: Path, field: str) -> zipfile.ZipFile:
    stem, digits = str(path)[: -len(path.suffix)], len(path.suffix) - 1
    paths: list[Path] = []
    while (part := Path(f"{stem}.{len(paths) + 1:0{digits}d}")).is_file():
        paths.append(part)
    try:
        return zipfile.ZipFile(io.BufferedReader(JoinedFile(paths)))
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{len(paths)} parts do not make a zip ({error}); is {part.name} missing?",
            field=field,
            value=path,
        ) from None


def _open_split(path: Path, field: str, last: int, directory: int, end: int) -> zipfile.ZipFile:
    """Open a split archive.

    Args:
        last: number of the last part, from 0, which is `path`. directory: of the part in
            which the central directory begins. end: place of its end record in `path`.
    """
    parts = [path.with_suffix(f".z{number:02d}") for number in range(1, last + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(
                f"is the last of {last + 1} parts, {part.name} is not beside it; copy it there",
                field=field,
                value=path,
            )
    joined = JoinedFile([*parts, path])
    locator = joined.starts[last] + end - _LOCATOR_SIZE
    joined.seek(locator)
    if joined.read(4) == _LOCATOR:
        # zipfile refuses the zip64 form of several parts; to it, this is one.
        place = locator - 56
        joined.patches.append((locator, _LOCATOR + struct.pack("<LQL", 0, place, 1)))
    joined.seek(0)
    archive = zipfile.ZipFile(io.BufferedReader(joined))
    for member in archive.infolist():
        # zipfile took all places as if counted from the part where the directory begins.
        member.header_offset += joined.starts[member.volume] - joined.starts[directory]
        if hasattr(member, "_end_offset"):  # its guard against overlaps, from the wrong places
            member._end_offset = None
    return archive
