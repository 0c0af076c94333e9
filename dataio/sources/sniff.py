"""Whether a file is an image, by its name or its first bytes."""

import re
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image

from dataio.sources.source import IMAGE_SUFFIXES

# Names that are taken whatever the file holds: what is no image is reported as unreadable.
SUFFIXES = (
    *IMAGE_SUFFIXES,
    *(".gif", ".jfif", ".jpe", ".avif", ".jp2", ".mpo"),
    *(".heic", ".heif", ".hif", ".jxl"),  # the reason why Pillow cannot open them is worth a row
)
HEAD_BYTES = 32
HIDDEN, HIDDEN_FOLDER = "hidden", "hidden folder"
_SHOWN = 12  # suffixes of `Unseen`'s line
# Pillow opens these as TIFFs, and would show the small preview of a photograph.
_RAW = (".dng", ".nef", ".nrw", ".cr2", ".arw", ".srf", ".sr2", ".pef", ".srw", ".3fr", ".iiq", ".rwl")
# Not pictures of pixels, or not opened without another program.
_NO_PICTURES = frozenset(["BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"])
# Their first bytes occur in nothing else. Of the others' ("BM", "P2") the file must open, too.
_SURE = frozenset(
    ["AVIF", "BLP", "DDS", "GIF", "ICNS", "JPEG", "JPEG2000", "PNG", "PSD", "QOI", "SUN", "TIFF", "WEBP"]
)
_HEIF = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_JPEG_XL = (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")


def named_as_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return name.lower().endswith(SUFFIXES)


def sniff_image(name: str, head: bytes, open_file: Callable[[], BinaryIO]) -> bool:
    """Whether a file holds an image, by its content.

    Args:
        name: decides only on formats without a mark of their own (TGA).
        head: the first HEAD_BYTES bytes. open_file: opens the file, where these do not decide.
    """
    suffix = _suffix(name)
    if not head or suffix in _RAW:
        return False
    if _HEIF.match(head) or head.startswith(_JPEG_XL):
        return True
    Image.init()
    formats, start = [], head[:16].ljust(16, b"\0")  # a tiny file
    for kind, (_, accept) in Image.OPEN.items():
        if kind in _NO_PICTURES:
            continue
        fits = accept(start) if accept else Image.EXTENSION.get(suffix) == kind
        if fits and kind in _SURE:
            return True
        if fits:
            formats.append(kind)
    if not formats:
        return False
    try:
        with open_file() as file, Image.open(file, formats=formats):
            return True
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True
    except Exception:  # whatever a decoder raises for a file of another kind
        return False


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if stem and dot else ""


class Unseen:
    """Counts the files that were not looked at, by suffix."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str) -> None:
        """Count a file by its name's suffix."""
        suffix = _suffix(name)
        # "photo.2 of 3" has no suffix, and a message no control characters.
        self.add_kind(suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "none")

    def add_kind(self, kind: str, count: int = 1) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + count

    def merge(self, other: "Unseen") -> None:
        for kind, count in other._counts.items():
            self.add_kind(kind, count)

    @property
    def only_hidden(self) -> bool:
        return self._counts.keys() <= {HIDDEN, HIDDEN_FOLDER}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        """Such as "34 other files were not looked at (.txt 30, .csv 3, none 1)"."""
        total = sum(self._counts.values())
        kinds = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{kind} {count}" for kind, count in kinds[:_SHOWN]]
        if rest := kinds[_SHOWN:]:
            shown.append(f"{len(rest)} other suffixes {sum(count for _, count in rest)}")
        files = "1 other file was" if total == 1 else f"{total} other files were"
        hint = (
            "; an archive in a folder is not opened, give it by its own path"
            if ".zip" in self._counts
            else ""
        )
        return f"{files} not looked at ({', '.join(shown)}){hint}"
