"""Five views of one data set, which differ in what a detector may learn instead of the picture.

* `raw`: the files as they are.
* `jpeg_fakes`: generated images become JPEGs of one quality, and of the photographs only
  those stay whose quantisation tables are of just that quality (as UnbiasedGenImage does).
* `jpeg_all`: every image becomes a JPEG of that quality.
* `history`: losslessly stored images are coded once as the lossy ones were, with quality and
  subsampling drawn from those of the lossy ones.
* `size`: every image is cropped to one square; images that are smaller are left out.

A view maps one file to another, or leaves it out and says why; the checkpoint's own codec
policy follows.
"""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from dataio.core.errors import UserError
from dataio.images.opening import (
    MEGAPIXELS,
    Undecodable,
    image_orientation,
    open_header,
    open_image,
    to_rgb,
    upright,
)
from dataio.images.stored import draw_history, jpeg_history, jpeg_quality, stored_lossless
from dataio.perturb.degradations import Operation, degrade, draw_chain, png

VIEWS = ("raw", "jpeg_fakes", "jpeg_all", "history", "size")
LEFT_OUT = "left out: "  # what the reasons of `LeftOut` begin with

_GRID = 16  # pixels of a JPEG's largest coding unit; a crop at its multiples keeps the grid


class LeftOut(Undecodable):
    """An image that a view leaves out on purpose; the message begins with `LEFT_OUT`."""


class View(Protocol):
    """A pure function of one file, its key and whether it is a photograph; can be pickled."""

    def __call__(self, source: bytes, key: str, real: bool) -> bytes:
        """The file to be evaluated in the place of `source`.

        Raises:
            LeftOut: the view has no place for it. Undecodable: it cannot be decoded.
        """


@dataclass(frozen=True)
class Degraded:
    """The operations, or a chain of `chain` drawn ones where that is not 0; neither is raw."""

    operations: tuple[Operation, ...] = ()
    chain: int = 0
    seed: int = 0

    def __call__(self, source: bytes, key: str, real: bool) -> bytes:
        operations = draw_chain(self.chain, self.seed, key) if self.chain else self.operations
        return degrade(source, operations, self.seed, key)


@dataclass(frozen=True)
class JpegFakes:
    """See `jpeg_fakes` above; a JPEG that was generated is coded once more.

    Photographs are filtered by quality alone, whatever their subsampling (Pillow's number).
    """

    quality: int
    subsampling: int = 2

    def __call__(self, source: bytes, key: str, real: bool) -> bytes:
        if not real:
            return _as_jpeg(source, self.quality, self.subsampling)
        stored = jpeg_quality(source)
        if stored is None:
            raise LeftOut(f"{LEFT_OUT}a photograph that is not a JPEG")
        if not stored.exact or stored.quality != self.quality:
            # One reason for all of them: they are counted.
            raise LeftOut(f"{LEFT_OUT}a photograph of another JPEG quality than {self.quality}")
        return source


@dataclass(frozen=True)
class JpegAll:
    """See `jpeg_all` above."""

    quality: int
    subsampling: int = 2

    def __call__(self, source: bytes, key: str, real: bool) -> bytes:
        return _as_jpeg(source, self.quality, self.subsampling)


@dataclass(frozen=True)
class HistoryMatched:
    """See `history` above; `history` is {"quality:subsampling": count}."""

    history: dict[str, int] = field(hash=False)

    def __call__(self, source: bytes, key: str, real: bool) -> bytes:
        open_image(source)  # what cannot be decoded has no history either
        if not stored_lossless(source):
            return source
        return _as_jpeg(source, *draw_history(source, self.history))


@dataclass(frozen=True)
class SizeMatched:
    """See `size` above: the square of `side` pixels nearest the middle.

    A JPEG is cut on its grid and coded with its own tables, which leaves its history as it
    is but for rounding; anything else becomes a PNG.
    """

    side: int

    def __call__(self, source: bytes, key: str, real: bool) -> bytes:
        image = open_image(source)
        if min(image.size) < self.side:
            raise LeftOut(f"{LEFT_OUT}smaller than {self.side} px")
        is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        if is_jpeg and image_orientation(image) == 1:
            left, top = ((side - self.side) // 2 // _GRID * _GRID for side in image.size)
            buffer = io.BytesIO()
            stored = jpeg_quality(source)
            image.crop((left, top, left + self.side, top + self.side)).save(
                buffer,
                "JPEG",
                qtables=image.quantization,  # type: ignore[attr-defined]
                subsampling=stored.subsampling if stored else 0,
            )
            return buffer.getvalue()
        image = to_rgb(upright(image))
        left, top = ((side - self.side) // 2 for side in image.size)
        return png(image.crop((left, top, left + self.side, top + self.side)))


def _as_jpeg(source: bytes, quality: int, subsampling: int) -> bytes:
    buffer = io.BytesIO()
    image = to_rgb(upright(open_image(source)))
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def history_of(sources: Iterable[bytes]) -> dict[str, int]:
    """Histogram of the JPEGs' {"quality:subsampling": count}.

    Raises:
        UserError: none of them is a JPEG.
    """
    counts = Counter(history for source in sources if (history := jpeg_history(source)))
    if not counts:
        raise UserError(
            "view history: none of the chosen images is a JPEG, so there is no history to match; leave it out of views"
        )
    return dict(sorted(counts.items()))


def smallest_side(sources: Iterable[bytes]) -> int:
    """The shortest side among images, pixels, from their headers; files that are none do not count.

    Raises:
        UserError: none of them is an image.
    """
    sides = []
    for source in sources:
        try:
            sides.append(min(open_header(source, MEGAPIXELS).size))
        except Exception:  # whatever a parser raises: `open_image` will say so
            continue
    if not sides:
        raise UserError("view size: no generated image among the chosen ones; set size to a number of pixels")
    return min(sides)
