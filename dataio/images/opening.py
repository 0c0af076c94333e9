"""From a file's bytes to an upright RGB picture: the one way for everything that looks at pixels.

Whatever a decoder or a parser of metadata raises for one file becomes `Undecodable`, so that
one odd file among a million costs that file and nothing else.
"""

import io
import re
import struct
import threading
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dataio.core.errors import one_line
from dataio.images.unknown_format import unknown_format

MEGAPIXELS = 200  # the largest image by default: the largest phones take 108 and 200
_ORIENTATION = 0x0112  # of EXIF and TIFF 6.0
_POINTERS = (0x8769, 0x8825, 0xA005)  # from a TIFF's tags to those of EXIF, GPS, interoperability
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = "value of white"  # our key in Pillow's `info`, which survives what is done to the image
_pillow_limit = threading.Lock()


class Undecodable(Exception):
    """An image that cannot be decoded completely; the message says why."""


def open_image(source: bytes, *, max_megapixels: float = MEGAPIXELS) -> Image.Image:
    """Decode the first frame completely, as it is stored: see `upright`.

    Args:
        max_megapixels: refuse larger ones before they are decoded. The limit of the program
            around us, `PIL.Image.MAX_IMAGE_PIXELS`, stays as it is and does not count.

    Raises:
        Undecodable: zero bytes, an unknown format, truncated or damaged data, too many pixels,
            or anything else that a decoder raises.
    """
    if not source:
        raise Undecodable("zero bytes")
    if not source.strip(b"\0"):
        raise Undecodable("nothing but zero bytes")
    try:
        image = open_header(source, max_megapixels)
        _load(image)
        white = _white(image, source)
    except (Undecodable, UnidentifiedImageError) as error:
        raise Undecodable(str(error) if isinstance(error, Undecodable) else unknown_format(source)) from None
    except Image.DecompressionBombError as error:  # from within a format: an icon, a frame, a tile
        raise _too_large(int((re.findall(r"\d+", str(error)) or ["0"])[0]), max_megapixels) from None
    # Pillow's parsers raise what their lines happen to raise, `struct.error` and `AttributeError` too.
    except Exception as error:
        raise Undecodable(_reason(error)) from None
    if white is not None:
        image.info[_WHITE] = white
    return image


def open_header(source: bytes, max_megapixels: float) -> Image.Image:
    """The image with its header read and its size checked; raises what Pillow raises, and Undecodable.

    Pillow's limit is a global of the process, and `Image.open` reads no other. So it is ours
    for as long as that takes, in one thread at a time.
    """
    with _pillow_limit:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, round(max_megapixels * 1e6)
        try:
            image = Image.open(io.BytesIO(source))
        finally:
            Image.MAX_IMAGE_PIXELS = theirs
    if image.width * image.height > max_megapixels * 1e6:
        raise _too_large(image.width * image.height, max_megapixels)
    return image


def _too_large(pixels: int, limit: float) -> Undecodable:
    return Undecodable(
        f"{pixels / 1e6:.0f} megapixels, more than the limit of {limit:g}; raise it with --max-megapixels "
        "(shard: --codec.max_megapixels)"
    )


def _load(image: Image.Image) -> None:
    """Decode the pixels, without what Pillow does to a TIFF there.

    It reads all other tags too, which may be damaged, and turns the picture upright.
    """
    orientation = image_orientation(image) if image.format == "TIFF" else 1
    if image.format == "TIFF":
        exif = image.getexif()
        for tag in (_ORIENTATION, *_POINTERS):
            if tag in exif:
                del exif[tag]
    image.load()
    if orientation != 1:
        image.getexif()[_ORIENTATION] = orientation


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "more memory is needed to decode it than there is"
    text = one_line(error)
    if isinstance(error, OSError | ValueError | SyntaxError) and text:
        return text
    name = "struct.error" if isinstance(error, struct.error) else type(error).__name__
    return f"damaged: its decoder failed ({name}{': ' if text else ''}{text})"


def image_orientation(image: Image.Image) -> int:
    """How the picture is to be turned: EXIF's number 1 to 8, or XMP's where EXIF has none.

    Only this tag is read; 1 where it is missing, out of range or unreadable.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    # A damaged block of metadata raises what its parser happens to raise.
    except Exception:
        value = _exif_orientation(image.info.get("exif"))
    with suppress(Exception):  # a value may be of any type
        return next((number for number in _TURNS if value == number), 1)
    return 1


def _exif_orientation(block: Any) -> int:
    """The tag of a block that Pillow cannot read, from the first directory's entries alone."""
    if not isinstance(block, bytes):
        return 1
    block = re.sub(b"^(Exif\0\0){1,2}", b"", block)
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    with suppress(struct.error):
        (at,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, at)
        for place in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", block, place)
            if tag == _ORIENTATION and (kind, values) == (3, 1):  # one SHORT, as the standard says
                return int(struct.unpack_from(f"{order}H", block, place + 8)[0])
    return 1


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its metadata say, without these metadata; itself where nothing is to be done."""
    turn = _TURNS.get(image_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key not in _METADATA}
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode; transparency is dropped.

    Of 16 bits the low byte is dropped. Integers and floats say nowhere which value is white, so
    they are taken where their range or the file leaves no doubt: up to 255 in 32 bits, up to
    65,535 where the brightest is at least a quarter of that, floats from 0 to 1.

    Raises:
        Undecodable: values of another range, or a mode that Pillow cannot convert.
    """
    try:
        if image.mode.startswith(("I", "F")):
            return Image.fromarray(_to_8_bits(image)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Undecodable:
        raise
    except Exception as error:
        raise Undecodable(f"mode {image.mode} cannot be converted to RGB ({one_line(error)})") from None


def _to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Values of mode I, I;16 or F as 8 bits, uint8 [H, W]."""
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise Undecodable(f"its values go from {least:g} to {most:g}; convert it to 8 bits")
    if image.mode == "F":
        if least >= 0 and most <= 1:
            return np.rint(values * 255).astype(np.uint8)
        if (values != np.rint(values)).any():
            raise _unknown_white(least, most)
    white = image.info.get(_WHITE)
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


def _unknown_white(least: float, most: float) -> Undecodable:
    return Undecodable(
        f"its values go from {least:g} to {most:g}, and the file does not say which is white; "
        "convert it to 8 bits"
    )


def _white(image: Image.Image, source: bytes) -> int | None:
    """The value of white by what the format or the file itself says; None where neither does."""
    if not image.mode.startswith("I"):
        return None
    if image.format in ("PPM", "JPEG2000"):  # Pillow scales these to 16 bits
        return 65535
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = int(tags.get(258, (1,))[0])
        stated = tags.get(281)
        stated = int(stated[0] if isinstance(stated, tuple) else stated) if stated is not None else 0
        if 0 < stated < 2 ** min(bits, 31) - 1:
            return stated
        return 2**bits - 1 if 8 < bits < 16 else None
    if image.format == "PNG":
        return _png_white(image, source)
    return None


def _png_white(image: Image.Image, source: bytes) -> int | None:
    """From the chunk sBIT, of values that are not scaled to 16 bits, as they should be."""
    at = source.find(b"sBIT", 0, max(source.find(b"IDAT"), 0))
    bits = source[at + 4] if at >= 0 else 16
    values = np.asarray(image)
    if not 8 <= bits < 16 or values.max() >= 2**bits or not (values & 2 ** (16 - bits) - 1).any():
        return None
    return int(2**bits - 1)
