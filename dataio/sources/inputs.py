"""What a person points at, as a stream of images: files, folders, globs, zips, a list on standard input."""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dataio.core.errors import UserError
from dataio.sources.source import IMAGE_SUFFIXES, Source, read_file

SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
_URL = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)
_ZIP = re.compile(r"\.zip(\.0*1)?$", re.IGNORECASE)


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

    A folder gives the images below it (by suffix, sorted, hidden ones left out; each folder
    once, so that links in a circle end). A zip gives its images as "zip/member". A path that
    does not exist and holds *, ? or [ is a glob. "-" reads paths from `stdin`.

    Args:
        null: the paths on `stdin` end with a zero byte, not with a newline.
    """
    for path in paths:
        if path == "-":
            for line in _lines(stdin, b"\0" if null else b"\n"):
                yield from _follow(os.fsdecode(line if null else line.removesuffix(b"\r")))
        elif _URL.match(path) and not os.path.lexists(path):
            yield Input(path, None, "is a URL, expected a file or folder; download it first")
        elif not os.path.lexists(path) and any(mark in path for mark in "*?["):
            yield from _glob(path)
        else:
            yield from _follow(path)


def _lines(stream: BinaryIO, end: bytes) -> Iterator[bytes]:
    rest = b""
    read = getattr(stream, "read1", stream.read)  # what has arrived, where the writer is slow
    while block := read(65536):
        *whole, rest = (rest + block).split(end)
        yield from filter(None, whole)
    if rest:
        yield rest


def _follow(path: str) -> Iterator[Input]:
    if os.path.isdir(path):
        yield from _in_folder(path)
    elif _ZIP.search(path) and os.path.isfile(path):
        yield from _in_zip(path)
    else:
        yield _file(path)


def _file(path: str) -> Input:
    return Input(path, lambda: read_file(path))


def _glob(pattern: str) -> Iterator[Input]:
    # Not glob.glob, whose ** follows links in a circle.
    anchor = Path(pattern).anchor
    try:
        paths = sorted(
            map(str, Path(anchor or ".").glob(os.path.relpath(pattern, anchor) if anchor else pattern))
        )
    except (ValueError, NotImplementedError, OSError) as error:
        yield Input(pattern, None, f"not a usable pattern ({error})")
        return
    given = set(Path(pattern).parts)
    paths = [path for path in paths if not _hidden(set(Path(path).parts) - given)]
    if not paths:
        yield Input(pattern, None, "no file matches")
    for path in paths:
        # Of a ** the folders come too, whose files come by themselves.
        if "**" not in pattern or not os.path.isdir(path):
            yield from _follow(path)


def _hidden(parts: set[str]) -> bool:
    """Whether a wildcard matched a name that begins with a dot, as in a shell it would not."""
    return any(part.startswith(".") for part in parts)


def _in_folder(top: str) -> Iterator[Input]:
    count, seen, pending = 0, set[tuple[int, int]](), [top]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted((e.name, _is_dir(e)) for e in entries if not e.name.startswith("."))
        except OSError as error:
            count += 1
            yield Input(folder, None, f"cannot be read ({error.strerror})")
            continue
        for name, is_folder in names:
            if not is_folder and name.lower().endswith(SUFFIXES):
                count += 1
                yield _file(os.path.join(folder, name))
        pending += [os.path.join(folder, name) for name, is_folder in reversed(names) if is_folder]
    if not count:
        yield Input(top, None, f"holds no image ({', '.join(SUFFIXES)})")


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _in_zip(path: str) -> Iterator[Input]:
    try:
        source = Source(path, "zip")
        members = [name for name in source.files() if name.lower().endswith(SUFFIXES)]
    except (UserError, OSError) as error:
        yield Input(path, None, str(error).removeprefix(f"zip {path}: "))
        return
    if not members:
        yield Input(path, None, f"holds no image ({', '.join(SUFFIXES)})")
    lock = threading.Lock()  # one file position for all threads

    def reader(member: str) -> Callable[[], bytes]:
        def read() -> bytes:
            with lock:
                return source.read(member)

        return read

    for member in members:
        yield Input(f"{path}/{member}", reader(member))
