"""What happens to images on their way: JPEG, WebP, resizing, blur, noise, crops, and chains.

Every operation is a pure function of the image, the seed, the image's key and the
operation: the same seed gives the same bytes, and the same images differ between two
severities by the severity alone. The result is again a file, as a person would upload it:
JPEG or WebP where that came last, else a PNG.
"""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.core.counter_rng import hash64
from dataio.core.errors import UserError
from dataio.images.opening import failing_as_undecodable, open_image, to_rgb, upright

MAX_CHAIN = 5


@dataclass(frozen=True, slots=True)
class Operation:
    """One degradation and how strong it is; see `FAMILIES` for what the severity means."""

    family: str
    severity: float

    def __str__(self) -> str:
        return f"{self.family}-{self.severity:g}"


# GenImage's degraded test sets by their names there (the paper's table of degraded images).
GENIMAGE = {
    "LR112": Operation("short_side", 112),
    "LR64": Operation("short_side", 64),
    "JPEG65": Operation("jpeg", 65),
    "JPEG30": Operation("jpeg", 30),
    "blur3": Operation("blur", 3),
    "blur5": Operation("blur", 5),
}


class Draws:
    """Random numbers of one image under one name: counter-based, so that no state is shared."""

    def __init__(self, seed: int, key: str, name: str) -> None:
        text = f"{seed}:{name}:{key}".encode("utf-8", "surrogateescape")
        self._stream = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        self._used = 0

    def uniform(self, count: int) -> NDArray[np.float64]:
        """The next numbers, float64 [count] in the open interval (0, 1)."""
        position = np.arange(self._used, self._used + count, dtype=np.uint64)
        self._used += count
        # 52 bits, so that half a step more is still a double below 1.
        return ((hash64(self._stream, position) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.uniform(1)[0])


@dataclass(frozen=True, slots=True)
class _State:
    """An image in a chain, RGB, and its file where it is as it came out of that."""

    image: Image.Image
    file: bytes | None = None


def _through(image: Image.Image, kind: str, **options: int) -> _State:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return _State(to_rgb(open_image(buffer.getvalue())), buffer.getvalue())


def _jpeg(image: Image.Image, severity: float, draws: Draws) -> _State:
    return _through(image, "JPEG", quality=round(severity), subsampling=2)


def _webp(image: Image.Image, severity: float, draws: Draws) -> _State:
    return _through(image, "WEBP", quality=round(severity), method=4)


def _scaled(image: Image.Image, factor: float) -> _State | None:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if size == image.size:
        return None
    # Pillow's bicubic widens its support when shrinking, which is the antialiasing.
    return _State(image.resize(size, Image.Resampling.BICUBIC))


def _resize(image: Image.Image, severity: float, draws: Draws) -> _State | None:
    return _scaled(image, severity)


def _short_side(image: Image.Image, severity: float, draws: Draws) -> _State | None:
    return None if min(image.size) <= severity else _scaled(image, severity / min(image.size))


def _blur(image: Image.Image, severity: float, draws: Draws) -> _State:
    # SciPy's is a Gaussian (cut at 4 sigma); Pillow's is an approximation by boxes.
    from scipy.ndimage import gaussian_filter  # --help of the protocols need not wait for it

    blurred = gaussian_filter(np.asarray(image, np.float64), (severity, severity, 0), mode="mirror")
    return _State(_from_float(blurred))


def _noise(image: Image.Image, severity: float, draws: Draws) -> _State:
    from scipy.special import ndtri

    pixels = np.asarray(image, np.float64)
    noise = ndtri(draws.uniform(pixels.size)).reshape(pixels.shape)
    return _State(_from_float(pixels + severity * noise))


def _crop(image: Image.Image, severity: float, draws: Draws) -> _State | None:
    width, height = (max(1, round(side * severity)) for side in image.size)
    if (width, height) == image.size:
        return None
    left = math.floor(draws.between(0, image.width - width + 1))
    top = math.floor(draws.between(0, image.height - height + 1))
    return _State(image.crop((left, top, left + width, top + height)))


def _from_float(pixels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Family:
    """One kind of operation.

    Attributes:
        apply: image, severity and random numbers to the image after it; None where nothing changes.
        low, high: the severities that make sense, both included.
        meaning: of the severity, for messages and documents.
        chained: the range that chains draw from. whole: severities are whole numbers.
    """

    apply: Callable[[Image.Image, float, Draws], _State | None]
    low: float
    high: float
    meaning: str
    chained: tuple[float, float] | None = None
    whole: bool = False


FAMILIES = {
    "jpeg": Family(_jpeg, 1, 100, "quality of a 4:2:0 JPEG", (30, 95), whole=True),
    "webp": Family(_webp, 1, 100, "quality of a lossy WebP", (30, 95), whole=True),
    "resize": Family(_resize, 0.05, 4, "factor of both sides, bicubic", (0.5, 1.5)),
    "blur": Family(_blur, 0.1, 50, "sigma of a Gaussian, pixels", (0.5, 2)),
    "noise": Family(_noise, 0.1, 128, "sigma of Gaussian noise, of 255", (1, 10)),
    "crop": Family(_crop, 0.05, 1, "share of both sides kept, at a place drawn", (0.6, 0.95)),
    "short_side": Family(_short_side, 8, 4096, "shortest side in pixels, where it is longer", None, True),
}
CHAINED = tuple(name for name, family in FAMILIES.items() if family.chained)


def check_operation(operation: Operation, where: str) -> None:
    """Raise a UserError that begins with `where` for an unknown family or a severity out of range."""
    if operation.family not in FAMILIES:
        raise UserError(f"{where}: no operation {operation.family!r}; there are {', '.join(FAMILIES)}")
    family, value = FAMILIES[operation.family], operation.severity
    if not family.low <= value <= family.high or (family.whole and value != round(value)):
        kind = "a whole number from" if family.whole else "a number from"
        raise UserError(
            f"{where}.{operation.family}: severity {value:g}, expected {kind} {family.low:g} to "
            f"{family.high:g} ({family.meaning})"
        )


def draw_chain(length: int, seed: int, key: str) -> list[Operation]:
    """Which operations a chain applies to one image: different families in a drawn order.

    Args:
        length: 1 to MAX_CHAIN. key: the image's name.
    """
    draws = Draws(seed, key, f"chain-{length}")
    order = np.argsort(draws.uniform(len(CHAINED)), kind="stable")[:length]
    chain = []
    for name in (CHAINED[number] for number in order):
        family = FAMILIES[name]
        assert family.chained is not None, "CHAINED has those only"
        value = draws.between(*family.chained)
        chain.append(Operation(name, float(round(value)) if family.whole else round(value, 3)))
    return chain


@failing_as_undecodable()
def degrade(source: bytes, operations: Sequence[Operation], seed: int, key: str) -> bytes:
    """One image file after the operations, in order; a pure function of its arguments.

    EXIF orientation is applied first, what is transparent becomes white, and no metadata is kept.
    Where nothing is changed (no operations, an image that is small enough) the bytes come back as
    they are.

    Raises:
        dataio.images.opening.Undecodable: see `open_image`.
    """
    if not operations:
        return source  # also what cannot be decoded: that is for the codec to say
    state = _State(to_rgb(upright(open_image(source))), source)
    for place, operation in enumerate(operations):
        # Not by severity: a curve is of the same noise and the same place of the crop.
        draws = Draws(seed, key, f"{place}:{operation.family}")
        state = FAMILIES[operation.family].apply(state.image, operation.severity, draws) or state
    return png(state.image) if state.file is None else state.file


def png(image: Image.Image) -> bytes:
    """A PNG that is quick to write: it is read once."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
