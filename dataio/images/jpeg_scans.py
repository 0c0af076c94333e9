"""Whether a JPEG's scans deliver the whole picture.

Decoders fill what is missing with gray and call that a picture. A file that was cut short and
ends in the right marker looks complete to Pillow; a strict decoder complains of its data, but
of the first oddity only, which may be a harmless one. And a progressive file that ends after
one of its scans has no oddity at all: only its scans' headers say what they leave out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import simplejpeg

from dataio.core.errors import one_line

# What libjpeg says of data that are not what was coded.
_DAMAGE = re.compile(
    r"premature end|bad \w+ code|found marker|inconsistent progression|bogus|marker 0xd[0-7]", re.IGNORECASE
)
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes")
_NO_COMPLAINT = re.compile(r"unsupported|could not determine", re.IGNORECASE)  # but a decoder that cannot
_DECODING = frozenset([0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xDA])  # DHT, DAC, DQT, DNL, DRI, SOS
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset([0xC2, 0xC6, 0xCA, 0xCE])
_BARE = frozenset([0x01, *range(0xD0, 0xD9)])  # markers without a length
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_MOST_SCANS = 100  # of an odd file, each read with all before it; encoders write about ten
_FRAME_HEAD, _SCAN_HEAD = 8, 3  # bytes before the components: of SOF and (without tables) of SOS


class DamagedJpeg(Exception):
    """Scan data are missing or damaged; the message says how."""


@dataclass(frozen=True)
class _Segment:
    """A marker with its length and payload, and the coded data that follow an SOS."""

    marker: int
    body: bytes
    coded: bytes = b""

    def __bytes__(self) -> bytes:
        return bytes([0xFF, self.marker]) + self.body + self.coded


def check_jpeg(source: bytes) -> str:
    """Read all data of the first JPEG in a file, at an eighth of its size.

    Returns:
        what a strict decoder says of oddities that cost no pixel, "" where it says nothing.

    Raises:
        DamagedJpeg: data are missing, or are not what was coded.
    """
    said = _complaint(source)
    if _DAMAGE.search(said):
        raise DamagedJpeg(said)
    segments = _segments(source)
    missing = _missing(segments)
    if missing:
        raise DamagedJpeg(missing)
    if said:
        # The first oddity hides what comes behind it. So now without anything else than the data.
        hidden = _hidden(segments)
        if hidden:
            raise DamagedJpeg(hidden)
    return said


def _complaint(data: bytes) -> str:
    try:
        # A least size makes it decode to the smallest that there is.
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, strict=True)
    except ValueError as error:
        return "" if _NO_COMPLAINT.search(str(error)) else one_line(error)
    return ""


def _segments(source: bytes) -> list[_Segment]:
    """What decoding needs, from the start to the end of the first image."""
    found: list[_Segment] = []
    at = 2
    while 0 <= (at := source.find(b"\xff", at)) < len(source) - 3:
        marker = source[at + 1]
        if marker == 0xD9:
            break
        if marker in (0x00, 0xFF):
            at += 1 + (marker == 0x00)
            continue
        if marker in _BARE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(source[at + 2 : at + 4], "big")
        if marker in _FRAMES or marker in _DECODING:
            body, coded = source[at + 2 : end], b""
            if marker == 0xDA:
                match = _AFTER_SCAN.search(source, end)
                coded = source[end : match.start() if match else len(source)]
                end += len(coded)
            found.append(_Segment(marker, body, coded))
        at = end
    return found


def _missing(segments: Sequence[_Segment]) -> str:
    """What no scan delivers, by the scans' headers; "" where nothing is missing or a header is odd."""
    frame = next((segment for segment in segments if segment.marker in _FRAMES), None)
    if frame is None or len(frame.body) < _FRAME_HEAD + 3 * frame.body[7]:
        return ""
    components = [frame.body[_FRAME_HEAD + 3 * number] for number in range(frame.body[7])]
    if len(set(components)) < len(components):
        return ""
    progressive = frame.marker in _PROGRESSIVE
    # {component: the lowest bit so far of each of its 64 coefficients}; 16 is none yet.
    lowest = {component: [16] * 64 for component in components}
    for scan in segments:
        if scan.marker != 0xDA:
            continue
        count = scan.body[2] if len(scan.body) > 2 else 0
        if len(scan.body) < _SCAN_HEAD + 2 * count + 3:
            return ""
        named = scan.body[_SCAN_HEAD : _SCAN_HEAD + 2 * count : 2]
        first, last, bits = scan.body[_SCAN_HEAD + 2 * count :][:3]
        for component in named:
            if component not in lowest or last > 63:
                return ""
            if progressive:
                lowest[component][first : last + 1] = [bits & 15] * (last + 1 - first)
            else:
                lowest[component] = [0] * 64
    left = sum(bits > 0 for component in lowest.values() for bits in component)
    if not left:
        return ""
    whole = 64 * len(components)
    return f"scans are missing: {left} of its {whole} coefficients do not reach their last bit"


def _hidden(segments: Sequence[_Segment]) -> str:
    """What a strict decoder says of the data alone, scan by scan, but for bytes behind their end."""
    done = b"\xff\xd8"
    if sum(segment.marker == 0xDA for segment in segments) > _MOST_SCANS:
        return f"more than {_MOST_SCANS} scans"
    for segment in segments:
        if segment.marker != 0xDA:
            done += bytes(segment)
            continue
        said = _complaint(done + bytes(segment) + b"\xff\xd9")
        for shorten in (_without_padding, _without_rest):
            extraneous = _EXTRANEOUS.search(said)
            if extraneous is None or _DAMAGE.search(said):
                break
            coded = shorten(segment.coded, int(extraneous[1]))
            segment = _Segment(segment.marker, segment.body, coded)
            said = _complaint(done + bytes(segment) + b"\xff\xd9")
        if _DAMAGE.search(said):
            return said
        done += bytes(segment)
    return ""


def _without_padding(coded: bytes, extraneous: int) -> bytes:
    """Zeros at the end may be padding, or a file's part that was never written: then data are missing."""
    bare = coded.rstrip(coded[-1:])
    return bare + b"\0" if bare.endswith(b"\xff") else bare


def _without_rest(coded: bytes, extraneous: int) -> bytes:
    return coded[: max(0, len(coded) - extraneous)]
