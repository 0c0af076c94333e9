"""Metadata that matter for pixels: how a picture is to be turned.

Pillow's parsers read and write all tags to get at one, and raise where any of them is damaged;
viewers and browsers show such a file as if nothing were wrong.
"""

import re
import struct
from typing import Any

from PIL import Image

ORIENTATION = 0x0112  # the tag of EXIF and TIFF 6.0
METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps them
_RAW_PROFILE = METADATA[1]  # ImageMagick's, in hexadecimal digits
_PNG = b"\x89PNG\r\n\x1a\n"
_BLOCK = re.compile(rb"II\*\0|MM\0\*")
_PNG_METADATA = frozenset([b"eXIf", b"iCCP", b"iTXt", b"tEXt", b"tIME", b"zTXt"])
_JPEG_METADATA = frozenset([0xE1, 0xE2, 0xED])  # EXIF and XMP, profiles and more pictures, Photoshop


def image_orientation(image: Image.Image) -> int:
    """How the picture is to be turned: EXIF's number 1 to 8, or XMP's where EXIF has none.

    Only this tag is read; 1 where it is missing, out of range or unreadable.
    """
    try:
        value = _from_block(_exif_block(image.info)) or image.getexif().get(ORIENTATION, 1)
        # A value may be of any type; a fraction may be equal to a number.
        return next((number for number in range(2, 9) if value == number), 1)
    except Exception:  # a damaged block raises what its parser happens to raise
        return 1


def _exif_block(info: dict[Any, Any]) -> bytes:
    block = info.get("exif")
    if block is None and _RAW_PROFILE in info:
        block = bytes.fromhex("".join(info[_RAW_PROFILE].split("\n")[3:]))
    return block if isinstance(block, bytes) else b""


def _from_block(block: bytes) -> int:
    """The tag from the first directory's entries alone; 0 where it is not as the standard says."""
    block = re.sub(b"^(Exif\0\0){1,2}", b"", block)
    if block[:2] not in (b"II", b"MM"):
        return 0
    order, found = "<" if block[:2] == b"II" else ">", 0
    try:
        (at,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, at)
        for place in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, place)
            if (tag, kind, values) == (ORIENTATION, 3, 1):  # one SHORT
                found = int(value)
    except struct.error:  # the block ends early
        pass
    return found


def without_metadata(source: bytes) -> tuple[bytes, bytes]:
    """A JPEG or PNG without its metadata, and its EXIF block; an AVIF with an empty block, and b"".

    An AVIF says by itself how it is to be turned. Other files come back as they are.
    """
    if source[:8] == _PNG:
        return _plain_png(source)
    block = _BLOCK.search(source) if source[4:12] in (b"ftypavif", b"ftypavis") else None
    if block is not None:
        empty = b"II*\0\x08\0\0\0\0\0"  # a directory of no entries
        return source[: block.start()] + empty + source[block.start() + len(empty) :], b""
    return _plain_jpeg(source) if source[:2] == b"\xff\xd8" else (source, b"")


def _plain_png(source: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [_PNG], b"", 8
    while at < len(source):
        kind, end = source[at + 4 : at + 8], at + 12 + int.from_bytes(source[at : at + 4], "big")
        if kind == b"eXIf":
            exif = source[at + 8 : end - 4]
        if kind not in _PNG_METADATA:
            kept.append(source[at:end])
        at = end
    return b"".join(kept), exif


def _plain_jpeg(source: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [source[:2]], b"", 2
    while at + 4 <= len(source) and source[at] == 0xFF and source[at + 1] != 0xDA:
        marker, end = source[at + 1], at + 2 + int.from_bytes(source[at + 2 : at + 4], "big")
        if marker == 0xE1 and source[at + 4 : at + 8] == b"Exif":
            exif = exif or source[at + 4 : end]
        if marker not in _JPEG_METADATA:
            kept.append(source[at:end])
        at = end
    return b"".join(kept) + source[at:], exif
