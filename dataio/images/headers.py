"""Whether the header of an encoded image can be read, found before DALI sees it.

DALI 2.4 parses a batch of 32 or more in several tasks, and where one of them meets a header it
cannot read, the other tasks use a destroyed stack frame: the process segfaults without naming a
sample, so nothing can be skipped. (Below 32 there is one task; faults behind the header raise an
error.) So headers are checked here first, in microseconds, or less where an equal header has passed:
what one program writes for images of one size has the same bytes up to the scan.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dataio.images.opening import open_header

_ANY_SIZE = 1e6  # megapixels; what is in a shard was within its limit
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_BARE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers without a length


_KEPT = 1024  # good headers, of at most _LONGEST bytes
_LONGEST = 4096
_TRIED = 4  # lengths

_good: set[bytes] = set()  # JPEGs' bytes up to the scan
_lengths: tuple[int, ...] = ()  # of these, the newest first


def header_faults(encoded: Sequence[NDArray[np.uint8]]) -> Iterator[tuple[int, str]]:
    """The place and the fault of each image that `header_fault` finds one in, in order.

    Args:
        encoded: whole files, uint8 [bytes] each.
    """
    global _lengths
    for place, data in enumerate(encoded):
        for length in _lengths:
            if data[:length].tobytes() in _good:  # the verdict depends on these bytes alone
                break
        else:
            length = 0
        if length:
            continue
        fault, length = _checked(data.data)
        if fault:
            yield place, fault
        elif 0 < length <= _LONGEST and len(_good) < _KEPT:
            _good.add(data[:length].tobytes())
            _lengths = (length, *(other for other in _lengths if other != length))[:_TRIED]


def header_fault(data: bytes | memoryview) -> str:
    """What is wrong with an image's header, "" if nothing.

    Args:
        data: the whole file; JPEG (ITU T.81, annex B), or what Pillow opens.
    """
    return _checked(data)[0]


def _checked(data: bytes | memoryview) -> tuple[str, int]:
    """The fault, and how long a good JPEG's header is: up to the scan's data."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_fault(data)
    try:
        open_header(bytes(data), _ANY_SIZE)
    except Exception:  # Pillow's parsers raise nearly anything
        return "not a readable image format", 0
    return "", 0


def _jpeg_fault(data: bytes | memoryview) -> tuple[str, int]:
    """Walks the segments up to the scan; what is wrong behind it DALI reports by an exception."""
    at, size, framed = 2, len(data), False
    while at + 4 <= size:
        if data[at] != 0xFF:
            return f"no JPEG marker at byte {at}", 0
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in _BARE:
            at += 2
            continue
        if marker == 0xDA and at + 2 + length <= size:
            return ("", at + 2 + length) if framed else ("a JPEG without a frame's header", 0)
        if length < 2 or marker in (0x00, 0xD8, 0xD9):
            return f"an invalid JPEG marker at byte {at}", 0
        if marker in _FRAMES:
            body = data[at + 4 : at + 2 + length]
            # Bits of a sample, height, width, components and three bytes for each of these.
            whole = len(body) >= 6 and len(body) == 6 + 3 * body[5]
            if not whole or body[0] != 8 or not any(body[1:3]) or not any(body[3:5]):
                return "an invalid frame's header in a JPEG", 0
            framed = True
        at += 2 + length
    return "a JPEG that ends in its header", 0
