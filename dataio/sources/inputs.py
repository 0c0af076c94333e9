"""What a person points at, as a stream of images: files, folders, globs, zips, a list on standard input."""

import io
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dataio.core.errors import UserError
from dataio.core.log import log, progress
from dataio.sources.sniff import HEAD_BYTES, HIDDEN, HIDDEN_FOLDER, Unseen, named_as_image, sniff_image
from dataio.sources.source import Source, is_folder, is_hidden, read_file

_URL = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)
# A zip, or a part of one: `Source` says what is to be given instead.
_ZIP = re.compile(r"\.(zip|zip\.\d+|z\d\d+)$", re.IGNORECASE)
_LITTER = frozenset(["thumbs.db", "desktop.ini"])  # what Windows hides


@dataclass(frozen=True, slots=True)
class Input:
    """One image to be read, or the reason why a path leads to none.

    Attributes:
        path: as given, or folder/name, or zip/member.
        read: returns the bytes, in any thread; raises OSError. None where there is an error.
        error: one line, or "".
    """

    path: str
    read: Callable[[], bytes] | None
    error: str = ""


def find_inputs(paths: Iterable[str], stdin: BinaryIO, *, null: bool = False) -> Iterator[Input]:
    """Follow every path, in the order given; nothing is listed before it is needed.

    A folder gives the images below it (sorted, hidden ones left out; each folder once, so that
    links in a circle end). A zip gives its images as "zip/member". A path that does not exist
    and holds *, ? or [ is a glob. "-" reads paths from `stdin`. A file given by its own path is
    always taken; of the others those that are named as images or hold one. All other files are
    counted by suffix: in one log message at the end, or in the error of a path without any image.

    Args:
        null: the paths on `stdin` end with a zero byte, not with a newline.
    """
    unseen = Unseen()
    for path in paths:
        if path == "-":
            for line in _lines(stdin, b"\0" if null else b"\n"):
                yield from _follow(os.fsdecode(line if null else line.removesuffix(b"\r")), unseen)
        elif _URL.match(path) and not os.path.lexists(path):
            yield Input(path, None, "is a URL, expected a file or folder; download it first")
        elif not os.path.lexists(path) and any(mark in path for mark in "*?["):
            yield from _glob(path, unseen)
        else:
            yield from _follow(path, unseen)
    if unseen:
        # A warning, so that a program that calls this hears of it; not of a .DS_Store alone.
        (progress.info if unseen.only_hidden else log.warning)(str(unseen))


def _lines(stream: BinaryIO, end: bytes) -> Iterator[bytes]:
    rest = b""
    read = getattr(stream, "read1", stream.read)  # what has arrived, where the writer is slow
    while block := read(65536):
        *whole, rest = (rest + block).split(end)
        yield from filter(None, whole)
    if rest:
        yield rest


def _follow(path: str, unseen: Unseen) -> Iterator[Input]:
    if os.path.isdir(path):
        yield from _in_folder(path, unseen)
    elif _ZIP.search(path) and os.path.isfile(path):
        yield from _in_zip(path, unseen)
    else:
        yield _file(path)


def _file(path: str) -> Input:
    return Input(path, lambda: read_file(path))


def _glob(pattern: str, unseen: Unseen) -> Iterator[Input]:
    # Not glob.glob, whose ** follows links in a circle.
    anchor = Path(pattern).anchor
    # pathlib's ** at the end gives folders only, a shell's everything below.
    full = f"{pattern}/*" if Path(pattern).name == "**" else pattern
    try:
        paths = sorted(map(str, Path(anchor or ".").glob(os.path.relpath(full, anchor) if anchor else full)))
    except (ValueError, NotImplementedError, OSError) as error:
        yield Input(pattern, None, f"not a usable pattern ({error})")
        return
    given = set(Path(pattern).parts)
    count, here = 0, Unseen()
    for path in paths:
        if _hidden(set(Path(path).parts) - given):
            here.add_kind(HIDDEN_FOLDER if os.path.isdir(path) else HIDDEN)
        elif "**" in pattern and os.path.isdir(path):
            # Its files match by themselves, but not those behind a link, which may lead in a circle.
            if os.path.islink(path):
                here.add_kind("linked folder")
        elif os.path.isdir(path) or _ZIP.search(path):
            count += 1
            yield from _follow(path, unseen)
        elif _taken(path, here):
            count += 1
            yield _file(path)
    if not count:
        yield Input(pattern, None, f"no image matches; {here}" if here else "no file matches")
    else:
        unseen.merge(here)


def _hidden(parts: set[str]) -> bool:
    """Whether a wildcard matched a name that begins with a dot, as in a shell it would not."""
    return any(part.startswith(".") for part in parts)


def _taken(path: str, unseen: Unseen) -> bool:
    """Whether a file is an image by name or content, or cannot be read; others are counted."""
    if named_as_image(path):
        return True
    name = os.path.basename(path)
    if name.lower() in _LITTER:
        unseen.add_kind(HIDDEN)
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            unseen.add_kind("no plain file")
            return False
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        if sniff_image(name, head, lambda: open(path, "rb")):  # noqa: SIM115 (closed there)
            return True
    except OSError:  # reading it as an image says why
        return True
    unseen.add(name)
    return False


def _in_folder(top: str, unseen: Unseen) -> Iterator[Input]:
    count, here, seen, pending = 0, Unseen(), set[tuple[int, int]](), [top]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted((entry.name, is_folder(entry)) for entry in entries)
        except OSError as error:
            count += 1
            yield Input(folder, None, f"cannot be read ({error.strerror})")
            continue
        folders = []
        for name, below in names:
            path = os.path.join(folder, name)
            if is_hidden(name):
                here.add_kind(HIDDEN_FOLDER if below else HIDDEN)
            elif below:
                folders.append(path)
            elif _taken(path, here):
                count += 1
                yield _file(path)
        pending += reversed(folders)
    if not count:
        yield Input(top, None, _no_image(here))
    else:
        unseen.merge(here)


def _no_image(unseen: Unseen) -> str:
    return f"holds no image; {unseen or 'it is empty'}"


def _in_zip(path: str, unseen: Unseen) -> Iterator[Input]:
    here = Unseen()
    try:
        source = Source(path, "zip")
        members = [name for name in source.files_and_hidden() if _member_taken(source, name, here)]
    except (UserError, OSError) as error:
        yield Input(path, None, str(error).removeprefix(f"zip {path}: "))
        return
    if not members:
        yield Input(path, None, _no_image(here))
        return
    unseen.merge(here)
    lock = threading.Lock()  # one file position for all threads

    def reader(member: str) -> Callable[[], bytes]:
        def read() -> bytes:
            with lock:
                return source.read(member)

        return read

    for member in members:
        yield Input(f"{path}/{member}", reader(member))


def _member_taken(source: Source, name: str, unseen: Unseen) -> bool:
    """As `_taken`, of a member of a zip."""
    if is_hidden(name) or os.path.basename(name).lower() in _LITTER:
        unseen.add_kind(HIDDEN)
        return False
    if named_as_image(name):
        return True
    if source.is_encrypted(name):
        unseen.add_kind("encrypted")
        return False
    try:
        if sniff_image(name, source.head(name, HEAD_BYTES), lambda: io.BytesIO(source.read(name))):
            return True
    except OSError:
        return True
    unseen.add(name)
    return False
