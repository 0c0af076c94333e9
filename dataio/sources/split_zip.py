"""Zip archives in several parts, as GenImage is published, read without joining them first.

Two kinds are about: plain cuts of one file (`NAME.zip.001`, `.002`, as 7-Zip makes them, from
`.000` on by `split -d`) and split archives (`NAME.z01`, `.z02`, ..., `NAME.zip`, as `zip -s` and
WinZip make them), whose directory gives each member's part and its place in that part. Python's
zipfile reads the first kind from one long file, and the second once those places are counted
through, also where somebody has joined the parts with `cat`.
"""

import io
import re
import shlex
import struct
import zipfile
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from dataio.core.errors import UserError

_END = b"PK\x05\x06"  # end of central directory: APPNOTE.TXT 4.3.16
_HEADER = b"PK\x03\x04"  # of a member: 4.3.7
_SPANNED = b"PK\x07\x08"  # begins the first part of a split archive: 8.5.3
_LOCATOR = b"PK\x06\x07"  # of its zip64 form: 4.3.15
_LOCATOR_SIZE = 20
_END_SEARCH = 65_557  # its size and the longest comment


def _first_cut(path: Path) -> bool:
    """Whether the name is that of the first plain cut."""
    match = re.search(r"\.zip\.(0*[01])$", path.name, re.IGNORECASE)
    if match is None:
        return False
    before = path.with_name(path.name[:-1] + "0")  # `split -d` counts from 0
    return int(match[1]) == 0 or not before.is_file()


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
        archive = zipfile.ZipFile(path)
        if any(member.header_offset < 0 for member in archive.infolist()):
            archive.close()
            raise zipfile.BadZipFile("its beginning is missing")
        return archive
    joined = _open_joined(path, size - len(tail) + end_record, field)
    return joined or _open_split(path, field, last, directory, size - len(tail) + end_record)


def _open_cuts(path: Path, field: str) -> zipfile.ZipFile:
    stem, digits, first = str(path)[: -len(path.suffix)], len(path.suffix) - 1, int(path.suffix[1:])
    paths: list[Path] = []
    while (part := Path(f"{stem}.{len(paths) + first:0{digits}d}")).is_file():
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
    parts = [_beside(path, f"{path.stem}.z{number:02d}") for number in range(1, last + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(
                f"is the last of {last + 1} parts, {part.name} is not beside it; copy it there",
                field=field,
                value=path,
            )
    joined = JoinedFile([*parts, path])
    archive = _open_as_one(joined, joined.starts[last] + end)
    # zipfile took all places as if counted from the part where the directory begins.
    _move(archive, {n: joined.starts[n] - joined.starts[directory] for n in range(last + 1)})
    return archive


def _beside(path: Path, name: str) -> Path:
    """The file of this name in the folder of `path`, also where only its case is another."""
    found = path.with_name(name)
    if not found.is_file():
        found = next((p for p in path.parent.iterdir() if p.name.lower() == name.lower()), found)
    return found


def _open_as_one(joined: JoinedFile, end: int) -> zipfile.ZipFile:
    """Open all parts of a split archive as one file; places in it are still those in the parts."""
    locator = end - _LOCATOR_SIZE
    joined.seek(locator)
    if joined.read(4) == _LOCATOR:
        # zipfile refuses the zip64 form of several parts; to it, this is one.
        place = locator - 56
        joined.patches.append((locator, _LOCATOR + struct.pack("<LQL", 0, place, 1)))
    joined.seek(0)
    return zipfile.ZipFile(io.BufferedReader(joined))


def _move(archive: zipfile.ZipFile, by: dict[int, int]) -> None:
    """Add to the place of each member what `by` has for its part."""
    for member in archive.infolist():
        member.header_offset += by[member.volume]
        if hasattr(member, "_end_offset"):  # its guard against overlaps, from the wrong places
            member._end_offset = None


def _open_joined(path: Path, end: int, field: str) -> zipfile.ZipFile | None:
    """Open a split archive whose parts were joined into one file; None if this is the last part alone.

    The sizes of the parts are lost, but the members follow each other: where the first one of a
    part begins, the last one of the part before has ended.

    Args:
        end: place of the end record.
    """
    joined = JoinedFile([path])
    if joined.read(4) not in (_HEADER, _SPANNED):
        joined.close()
        return None
    try:
        archive = _open_as_one(joined, end)
    except zipfile.BadZipFile:
        return None
    assert archive.fp is not None
    # What zipfile added to each place, from where it found the directory.
    added = archive.start_dir - _directory_offset(joined, end)
    members = sorted(archive.infolist(), key=lambda member: (member.volume, member.header_offset))
    starts: dict[int, int] = {}
    before: zipfile.ZipInfo | None = None
    for member in members:
        offset = member.header_offset - added
        if before is None:
            place = offset if member.volume == 0 and _begins_at(joined, offset, member) else None
            if place is None:
                archive.close()
                return None
            starts[0] = 0
        elif member.volume not in starts:
            place = _next_place(joined, starts[before.volume] + before.header_offset - added, before, member)
            if place is None:
                archive.close()
                raise UserError(
                    "was joined from the parts of a split archive, but a part is missing; copy it, or repair it with "
                    f"`zip -FF {shlex.quote(path.name)} --out whole.zip` and give whole.zip",
                    field=field,
                    value=path,
                )
            starts[member.volume] = place - offset
        before = member
    _move(archive, {number: start - added for number, start in starts.items()})
    return archive


def _directory_offset(joined: JoinedFile, end: int) -> int:
    """Where the directory begins, counted from the beginning of its part."""
    joined.seek(end)
    (offset,) = struct.unpack_from("<L", joined.read(22), 16)
    joined.seek(max(0, end - _LOCATOR_SIZE))
    if joined.read(4) == _LOCATOR:
        joined.seek(end - _LOCATOR_SIZE - 56)
        (offset,) = struct.unpack_from("<Q", joined.read(56), 48)
    return int(offset)


def _begins_at(joined: JoinedFile, place: int, member: zipfile.ZipInfo) -> bool:
    """Whether a member's own header lies there."""
    joined.seek(place)
    header = joined.read(30)
    if len(header) < 30 or not header.startswith(_HEADER):
        return False
    name = joined.read(struct.unpack_from("<H", header, 26)[0])
    return name.decode("utf-8" if member.flag_bits & 0x800 else "cp437", "replace") == member.orig_filename


def _next_place(
    joined: JoinedFile, place: int, before: zipfile.ZipInfo, member: zipfile.ZipInfo
) -> int | None:
    """Where `member` begins, which follows `before` at `place`; None if it does not."""
    joined.seek(place)
    header = joined.read(30)
    if len(header) < 30:
        return None
    after = place + 30 + sum(struct.unpack_from("<HH", header, 26)) + before.compress_size
    # A data descriptor may follow, with and without its mark, in 32 and 64 bits: 4.3.9.
    return next((after + n for n in (0, 16, 12, 24, 20) if _begins_at(joined, after + n, member)), None)
