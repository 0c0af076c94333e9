"""Small pictures and files for the tests of opening."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 48, height: int = 32, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A ramp with noise, so that all of a file's data matter; also in modes that Pillow cannot convert to."""
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    ramp = np.add.outer(np.linspace(0, 100, height), np.linspace(20, 120, width))[:, :, None]
    image = Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        turned = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert turned is not None
        return turned
    return image.convert(mode)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", behind: bytes = b"") -> bytes:
    """A block of EXIF data of entries (tag, type, count, the 4 bytes of value or offset), without its name."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    block = head + struct.pack(f"{order}IH", 8, len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack(f"{order}HHI", tag, kind, count) + value
    return block + bytes(4) + behind


def oriented(orientation: int, order: str = "<") -> tuple[int, int, int, bytes]:
    """The entry of an orientation."""
    return 0x0112, 3, 1, struct.pack(f"{order}HH", orientation, 0)


def with_exif(kind: str, block: bytes, image: Image.Image | None = None) -> bytes:
    """A JPEG, PNG or WebP with a block of EXIF data, whatever is in it."""
    image = picture() if image is None else image
    if kind == "WEBP":
        return saved(image, "WEBP", exif=block)
    plain = saved(image, kind)
    if kind == "JPEG":
        body = b"Exif\0\0" + block
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    return plain[:33] + chunk(b"eXIf", block) + plain[33:]


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels, and has hardly any data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )
