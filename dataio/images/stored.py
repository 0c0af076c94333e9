"""How a file stores its picture: losslessly or not, and with which JPEG quality.

Read from the content alone: names lie (a JPEG named .png), and most formats' names do not say
(WebP, AVIF, JPEG 2000 and TIFF each store pictures either way).
"""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from dataio.images.opening import open_header

_ANY_SIZE = 1e6  # megapixels; nothing is decoded here that was not decoded before
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Of Pillow's formats, those that only have lossless codings; a palette was the author's choice.
_ALWAYS_LOSSLESS = (
    *("BMP", "CUR", "DCX", "DIB", "FITS", "FLI", "GBR", "GIF", "ICO", "IM", "MCIDAS", "MSP", "PCX"),
    *("PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM"),
)
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_OFFSETS, _TIFF_COUNTS = (273, 324), (279, 325)  # of strips, of tiles
_TIFF_JPEG = 7
# None, CCITT, LZW, Deflate (two numbers), PackBits, LZMA, Zstandard and the RLE of older programs.
_TIFF_LOSSLESS = frozenset([1, 2, 3, 4, 5, 8, 32766, 32771, 32773, 32809, 32946, 34925, 50000])
# Coded again without loss, a picture of which nothing was cut off takes as many bytes as before, but for
# the encoder's effort: measured are up to 1.03 (JPEG 2000) and 1.08 (AVIF), with loss from 1.09 and 1.26 on.
_SAME_SIZE = {"JPEG2000": 1.05, "AVIF": 1.15}
_LOSSLESS_AVIF = {"quality": 100, "subsampling": "4:4:4", "speed": 8}


def stored_lossless(source: bytes) -> bool | None:
    """Whether a file stores its (first) picture without loss; None for what Pillow does not know.

    WebP: by its chunk, VP8L or VP8. TIFF: by its compression. JPEG 2000: the reversible wavelet,
    and no bits cut off. AVIF: the matrix is identity or YCgCo-R, as encoders write it in their
    lossless modes, or the colors are not subsampled and nothing else is lost (Pillow's quality 100).
    DDS: no block compression. What cannot be decided counts as lossy.

    Args:
        source: the whole file.
    """
    if source.startswith(PNG_SIGNATURE):
        return True
    if source.startswith(_JPEG):
        return False
    if source[:4] == b"RIFF" and source[8:12] == b"WEBP":
        return _webp_lossless(source)
    image = _header(source)
    if image is None:
        return None
    kind = image.format or ""
    if kind == "TIFF":
        return image.tag_v2.get(_TIFF_COMPRESSION, 1) in _TIFF_LOSSLESS  # type: ignore[attr-defined]
    if kind in ("JPEG2000", "ICNS"):
        return _jpeg2000_lossless(source, icon=kind == "ICNS")
    if kind == "AVIF":
        return _avif_lossless(source)
    if kind == "DDS":
        return all(tile[0] != "bcn" for tile in image.tile)  # type: ignore[attr-defined]
    return kind in _ALWAYS_LOSSLESS


def _header(source: bytes) -> Image.Image | None:
    try:
        return open_header(source, _ANY_SIZE)
    except Exception:  # Pillow's parsers raise nearly anything for a damaged header
        return None


def _chunks(source: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, end) of each chunk of a RIFF file between two places."""
    while at + 8 <= end:
        size = int.from_bytes(source[at + 4 : at + 8], "little")
        yield source[at : at + 4], at + 8, min(at + 8 + size, end)
        at += 8 + size + size % 2


def _webp_lossless(source: bytes) -> bool | None:
    for name, start, end in _chunks(source, 12, len(source)):
        # A frame of an animation has chunks of its own, behind 16 bytes of place and time.
        inner = _chunks(source, start + 16, end) if name == b"ANMF" else [(name, start, end)]
        for kind, _, _ in inner:
            if kind in (b"VP8L", b"VP8 "):
                return kind == b"VP8L"
    return None


def _jpeg2000_lossless(source: bytes, *, icon: bool) -> bool:
    start = source.find(b"\xff\x4f\xff\x51")  # SOC and SIZ, which begin a codestream
    if start < 0:
        return icon  # the other icons are PNGs and raw pixels
    style = source.find(b"\xff\x52", start)
    # COD: marker, length, style, order, layers, color transform, levels, block sizes, style, wavelet.
    if style < 0 or source[style + 13 : style + 14] != b"\x01":
        return False
    return not _was_larger(source, "JPEG2000")


def _avif_lossless(source: bytes) -> bool:
    at = source.find(b"colrnclx")
    # Primaries, transfer and matrix, 2 bytes each: identity (0) and YCgCo-Re and -Ro (16, 17) lose nothing.
    if at >= 0 and int.from_bytes(source[at + 12 : at + 14], "big") in (0, 16, 17):
        return True
    # The third byte of each av1C: monochrome (0x10), as an opacity is, and two bits of subsampling.
    flags = [source[found.end() + 2 : found.end() + 3] for found in re.finditer(b"av1C", source)]
    colors = [flag[0] for flag in flags if flag and not flag[0] & 0x10]
    if not colors or any(flag & 0x0C for flag in colors):
        return False
    return not _was_larger(source, "AVIF", **_LOSSLESS_AVIF)


def _was_larger(source: bytes, kind: str, **options: Any) -> bool:
    """Whether the picture takes more bytes without loss than the file has."""
    again = io.BytesIO()
    try:
        open_header(source, _ANY_SIZE).save(again, kind, **options)
    except Exception:  # not decodable, or no encoder for this mode: the header decides
        return kind == "AVIF"
    return len(again.getvalue()) > _SAME_SIZE[kind] * len(source)


def draw_history(source: bytes, history: dict[str, int]) -> tuple[int, int]:
    """(quality, subsampling) from the histogram, by a hash of the source's bytes."""
    digest = hashlib.blake2b(source, digest_size=8).digest()
    place = int.from_bytes(digest, "big") % sum(history.values())
    for name in sorted(history):
        place -= history[name]
        if place < 0:
            quality, _, subsampling = name.partition(":")
            return int(quality), int(subsampling)
    raise AssertionError("a draw lies within the histogram")


@lru_cache
def _luminance_tables() -> dict[tuple[int, ...], tuple[int, tuple[int, ...]]]:
    """{luminance table: (quality, chrominance table)} of the IJG encoder, asked of the encoder itself."""
    tables = {}
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality, subsampling=0)
        with Image.open(buffer) as image:
            quantization = image.quantization  # type: ignore[attr-defined]
            tables[tuple(quantization[0])] = (quality, tuple(quantization[1]))
    return tables


@dataclass(frozen=True, slots=True)
class JpegQuality:
    """What a JPEG's quantisation tables say.

    Attributes:
        quality: 1 to 100 by the IJG scale; where no quality has these tables (cameras,
            Photoshop), the nearest by mean absolute difference of the luminance table.
        exact: luminance and chrominance are the IJG tables of that quality.
        subsampling: Pillow's number (0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0 or anything else).
    """

    quality: int
    exact: bool
    subsampling: int


def jpeg_quality(source: bytes) -> JpegQuality | None:
    """Read the quality from a JPEG's header, without decoding; None for anything else.

    A phone's MPO is a JPEG with more pictures behind it; the first one counts. A TIFF that is
    compressed with JPEG has the quality of its first strip or tile.
    """
    jpeg = source if source.startswith(_JPEG) else _jpeg_in_tiff(source)
    if jpeg is None:
        return None
    try:
        # Not Image.open, which also reads the index of an MPO, and can fail in it.
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(jpeg))
        quantization = image.quantization
        table, chroma = tuple(quantization[0]), [tuple(quantization[n]) for n in quantization if n]
        sampling = JpegImagePlugin.get_sampling(image)
    except Exception:  # Pillow's parsers raise nearly anything for a damaged header
        return None
    tables = _luminance_tables()
    nearest = table
    if table not in tables:
        luminance = np.array(table)
        nearest = min(tables, key=lambda known: float(np.abs(np.array(known) - luminance).mean()))
    quality, its_chroma = tables[nearest]
    exact = nearest == table and all(other in (its_chroma, table) for other in chroma)
    return JpegQuality(quality, exact, sampling if sampling in (0, 1, 2) else 2)


def _jpeg_in_tiff(source: bytes) -> bytes | None:
    """The first strip or tile of a JPEG-compressed TIFF, its tables before it; None for anything else."""
    if source[:2] not in (b"II", b"MM") or (image := _header(source)) is None or image.format != "TIFF":
        return None
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(_TIFF_COMPRESSION) != _TIFF_JPEG:
        return None
    where, size = (
        next((tags[n] for n in names if n in tags), None) for names in (_TIFF_OFFSETS, _TIFF_COUNTS)
    )
    if not where or not size:
        return None
    tables, strip = tags.get(_TIFF_JPEG_TABLES, b""), source[where[0] : where[0] + size[0]]
    # An abbreviated stream of tables ends in EOI, and each strip begins with SOI.
    return tables.removesuffix(b"\xff\xd9") + strip[2:] if tables else strip


def jpeg_history(source: bytes) -> str | None:
    """Read "quality:subsampling" from a JPEG's header; None for anything else.

    Tables that no IJG quality has count as the nearest, see `JpegQuality`.
    """
    quality = jpeg_quality(source)
    return f"{quality.quality}:{quality.subsampling}" if quality else None
