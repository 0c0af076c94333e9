"""From a file's bytes to an upright RGB picture: the one way for everything that looks at pixels.

Whatever a decoder or a parser of metadata raises for one file becomes `Undecodable`, so that
one odd file among a million costs that file and nothing else.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dataio.core.errors import UserError, one_line
from dataio.images.jpeg_scans import DamagedJpeg, check_jpeg
from dataio.images.metadata import METADATA, ORIENTATION, image_orientation, without_metadata
from dataio.images.transparency import Transparency, alpha_of, on_white
from dataio.images.unknown_format import unknown_format

MEGAPIXELS = 200  # the largest image by default: the largest phones take 108 and 200
_POINTERS = (0x8769, 0x8825, 0xA005)  # from a TIFF's tags to those of EXIF, GPS, interoperability
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Our keys in Pillow's `info`, which survives what is done to the image.
_WHITE, _COMPLAINT = "value of white", "decoder's complaint"
_DRAFT_PIXELS = 89_478_485  # from here on JPEGs are decoded at the scale they are needed at
_JPEG_IN_TIFF = 7  # TIFF's compression
_pillow_limit = threading.Lock()


class Undecodable(Exception):
    """An image that cannot be decoded completely; the message says why."""


@contextmanager
def failing_as_undecodable() -> Iterator[None]:
    """Turn whatever the block raises for one image into `Undecodable`; errors of the user stay.

    Raises:
        Undecodable: the block raised an exception.
    """
    try:
        yield
    except (Undecodable, UserError):
        raise
    except UnidentifiedImageError:
        raise Undecodable("not an image Pillow knows") from None
    # Pillow's parsers raise what their lines happen to raise, `struct.error` and `AttributeError` too.
    except Exception as error:
        raise Undecodable(_reason(error)) from error


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Hide Pillow's warnings of odd metadata, which name no file; around all threads, which share them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


@failing_as_undecodable()
def open_image(
    source: bytes, *, max_megapixels: float = MEGAPIXELS, shortest: int | None = None
) -> Image.Image:
    """Decode the first frame completely, as it is stored: see `upright`.

    Args:
        max_megapixels: refuse larger ones before they are decoded. The limit of the program
            around us, `PIL.Image.MAX_IMAGE_PIXELS`, stays as it is and does not count.
        shortest: the pixels of the shortest side that are needed. A JPEG above 89 megapixels is
            then decoded at 1/2, 1/4 or 1/8, with at least twice as many; no other is.

    Raises:
        Undecodable: zero bytes, an unknown format, truncated or damaged data, too many pixels,
            or anything else that a decoder raises.
    """
    if not source:
        raise Undecodable("zero bytes")
    if not source.strip(b"\0"):
        raise Undecodable("nothing but zero bytes")
    try:
        image = _decoded(source, max_megapixels, shortest)
    except Undecodable:
        raise
    except Exception as error:
        # Some of Pillow's parsers of metadata let a damaged block of it fail the whole file.
        plain, exif = without_metadata(source)
        if plain == source:
            if isinstance(error, UnidentifiedImageError):
                raise Undecodable(unknown_format(source)) from None
            raise
        image = _decoded(plain, max_megapixels, shortest)
        if exif:
            image.info["exif"] = exif
    _check_data(image, source)
    _check_depth(image, source)
    white = _white(image) or _png_white(image, source)
    if white is not None:
        image.info[_WHITE] = white
    return image


def _decoded(source: bytes, max_megapixels: float, shortest: int | None) -> Image.Image:
    image = open_header(source, max_megapixels)
    if shortest is not None and image.width * image.height > _DRAFT_PIXELS:
        image.draft(None, (2 * shortest, 2 * shortest))
    _load(image)
    return image


def open_header(source: bytes, max_megapixels: float) -> Image.Image:
    """The image with its header read and its size checked; raises what Pillow raises, and Undecodable."""
    with _no_pillow_limit():
        image = Image.open(io.BytesIO(source))
    if image.width * image.height > max_megapixels * 1e6:
        raise _too_large(image.width * image.height, max_megapixels)
    return image


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Pillow's limit is a global of the process, and `Image.open` reads no other.

    So there is none for as long as that takes, in one thread at a time; nothing is decoded there.
    """
    with _pillow_limit:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def _too_large(pixels: int, limit: float) -> Undecodable:
    return Undecodable(
        f"{round(pixels / 1e6, 1):g} megapixels, more than the limit of {limit:g}; make it smaller, or "
        "raise --max-megapixels (shard: --codec.max_megapixels)"
    )


def _load(image: Image.Image) -> None:
    """Decode the pixels, without what Pillow does to a TIFF there.

    It reads all other tags too, which may be damaged, and turns the picture upright.
    """
    orientation = image_orientation(image) if image.format == "TIFF" else 1
    if image.format == "TIFF":
        with _no_pillow_limit():  # which Pillow checks once more where it takes the memory
            image.load_prepare()  # type: ignore[attr-defined]
        exif = image.getexif()
        for tag in (ORIENTATION, *_POINTERS):
            if tag in exif:
                del exif[tag]
    image.load()
    if orientation != 1:
        image._size = image.im.size  # which Pillow had set to that of the turned picture
        image.getexif()[ORIENTATION] = orientation


def _check_data(image: Image.Image, source: bytes) -> None:
    """Find the damage that Pillow's decoders pass over.

    Raises:
        DamagedJpeg: see `check_jpeg`. Undecodable: a PNG's checksum is wrong.
    """
    if image.format in ("JPEG", "MPO"):
        image.info[_COMPLAINT] = check_jpeg(source)
    elif image.format == "PNG":
        _check_png(source)
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(259) != _JPEG_IN_TIFF:
            return
        tables = tags.get(347, b"\xff\xd8").removesuffix(b"\xff\xd9")
        kinds = (324, 325) if 324 in tags else (273, 279)  # tiles or strips: where they are, how long
        for at, size in zip(*(tags[kind] for kind in kinds), strict=True):
            check_jpeg(tables + source[at + 2 : at + size])


def _check_png(source: bytes) -> None:
    """Pillow checks the checksums of all chunks but the pixels'."""
    at = 8
    while at + 8 <= len(source):
        end = at + 8 + int.from_bytes(source[at : at + 4], "big")
        if source[at + 4 : at + 8] == b"IDAT":
            if end > len(source):
                raise Undecodable("cut short: it ends within the data of its pixels")
            checksum = zlib.crc32(memoryview(source)[at + 4 : end]).to_bytes(4, "big")
            if not checksum.startswith(source[end : end + 4]):
                raise Undecodable(f"damaged: the checksum of the chunk at byte {at} is wrong")
        at = end + 4


def complaint_of(image: Image.Image) -> str:
    """The strict decoder's complaint about an image from `open_image` that lost no pixel, or ""."""
    return str(image.info.get(_COMPLAINT, ""))


def _reason(error: Exception) -> str:
    if isinstance(error, DamagedJpeg):
        return f"damaged or cut short: {error}"
    if isinstance(error, MemoryError):
        return "more memory is needed to decode it than there is"
    text = one_line(error)
    readable = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
    if isinstance(error, readable) and text:
        return text
    name = "struct.error" if isinstance(error, struct.error) else type(error).__name__
    return f"damaged: its decoder failed ({name}{': ' if text else ''}{text})"


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its metadata say, without these metadata; itself where nothing is to be done."""
    turn = _TURNS.get(image_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key not in METADATA}
    return turned


@failing_as_undecodable()
def to_rgb(image: Image.Image, transparency: Transparency = "white") -> Image.Image:
    """8-bit RGB from any mode.

    Of 16 bits the low byte is dropped. Integers and floats say nowhere which value is white, so
    they are taken where their range or the file leaves no doubt: up to 255 in 32 bits, up to
    65,535 where the brightest is at least a quarter of that, floats from 0 to 1, or to 255 where
    the brightest is at least a quarter of that.

    Args:
        transparency: "white" puts a picture that one can see through on white, as a white page
            shows it; "drop" takes its hidden colors. Without transparent pixels both are the same.

    Raises:
        Undecodable: values of another range, or a mode that Pillow cannot convert.
    """
    alpha = alpha_of(image) if transparency == "white" else None
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(image))
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb if alpha is None else on_white(rgb, alpha)


def _to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Values of mode I, I;16 or F as 8 bits, uint8 [H, W]."""
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise Undecodable(f"its values go from {least:g} to {most:g}; convert it to 8 bits")
    if image.mode == "F":
        if least >= 0 and most <= 1:
            return np.rint(values * 255).astype(np.uint8)
        if (values != np.rint(values)).any() and not (least >= 0 and 64 <= most <= 255):
            raise _unknown_white(least, most)
    white = image.info.get(_WHITE) or _white(image)
    if white is None:
        if "16" not in image.mode and most <= 255:
            white = 255
        elif most >= 2**14 or most == 0:
            white = 65535
    if white is None or least < 0 or most > white:
        raise _unknown_white(least, most)
    if white & (white + 1) == 0 and white >= 255:  # a whole number of bits: the high 8
        return (values.astype(np.int64) >> white.bit_length() - 8).astype(np.uint8)
    return np.rint(values * (255 / white)).astype(np.uint8)


def _check_depth(image: Image.Image, source: bytes) -> None:
    """Refuse color of 16 bits of which Pillow has kept the high 8, and nothing is in these.

    Raises:
        Undecodable: see `to_rgb`; the brightest is less than a quarter of 65,535.
    """
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA"):
        return
    if image.format == "PNG":
        deep = source[24] == 16  # the header's bits of a sample
    else:
        bits = getattr(image, "tag_v2", {}).get(258)
        deep = image.format == "TIFF" and isinstance(bits, tuple) and bits[0] == 16
    if deep:
        colors = np.asarray(image)[..., : 1 if image.mode == "LA" else 3]
        least, most = int(colors.min()), int(colors.max())
        if most < 2**6:
            raise _unknown_white(least << 8, (most << 8) + 255)


def _unknown_white(least: float, most: float) -> Undecodable:
    return Undecodable(
        f"its values go from {least:g} to {most:g}, and the file does not say which is white; "
        "convert it to 8 bits"
    )


def _white(image: Image.Image) -> int | None:
    """The value of white by what the format or a TIFF's tags say; None where neither does."""
    if not image.mode.startswith("I"):
        return None
    if image.format in ("PPM", "JPEG2000"):  # Pillow scales these to 16 bits
        return 65535
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return None
    bits = int(tags.get(258, (1,))[0])
    stated = tags.get(281, 0)
    stated = int(stated[0] if isinstance(stated, tuple) else stated)
    if 0 < stated < 2 ** min(bits, 31) - 1:
        return stated
    return int(2**bits - 1) if 8 < bits < 16 else None


def _png_white(image: Image.Image, source: bytes) -> int | None:
    """By the chunk sBIT, where the values are not scaled to 16 bits, as they should be."""
    at = source.find(b"sBIT", 0, max(source.find(b"IDAT"), 0))
    if image.format != "PNG" or not image.mode.startswith("I") or at < 0:
        return None
    bits, values = source[at + 4], np.asarray(image)
    unscaled = 8 <= bits < 16 and values.max() < 2**bits and (values & 2 ** (16 - bits) - 1).any()
    return int(2**bits - 1) if unscaled else None
