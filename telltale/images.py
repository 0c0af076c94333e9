"""What a caller passes as images, as inputs of the prediction path."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.core.errors import UserError, one_line
from dataio.images.opening import open_image, to_rgb, upright
from dataio.sources.inputs import Input, find_inputs

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path (of a file, a folder, a zip or a glob), a file's bytes, a PIL image, or uint8 [H, W, 3]."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/{1,2}|data:", re.IGNORECASE)
_ANY_SIZE = 1e6  # megapixels; the detector has its limit
_PNG_MODES = frozenset(["1", "L", "LA", "P", "RGB", "RGBA"])
_WITH_ALPHA = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}  # what is done with it is for the detector to say


def as_inputs(images: ImageLike | Iterable[ImageLike]) -> Iterator[Input]:
    """One image or many as inputs, in order; folders, zips and globs give one for each image.

    Args:
        images: also uint8 [N, H, W, 3], which is N images.

    Raises:
        UserError: a URL, an array of another type or shape, or an object of another kind.
    """
    batch = isinstance(images, np.ndarray) and images.ndim == 4
    if isinstance(images, str | bytes | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and not batch
    ):
        images = [images]
    if not isinstance(images, Iterable):
        raise _unknown(images)
    for number, image in enumerate(images):
        yield from _inputs_of(image, f"image[{number}]")


def _inputs_of(image: ImageLike, label: str) -> Iterator[Input]:
    if isinstance(image, str | os.PathLike):
        yield from _from_path(os.fspath(image))
    elif isinstance(image, bytes):
        yield Input(label, lambda: image)
    elif isinstance(image, Image.Image):
        yield _from_pillow(image, label)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{label}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        if not image.size:
            raise UserError(f"{label}: expected at least one pixel, got {list(image.shape)}")
        yield _from_pillow(Image.fromarray(image), label)
    else:
        raise _unknown(image)


def _from_path(path: str) -> Iterator[Input]:
    if _URL.match(path) and not Path(path).exists():
        raise UserError(f"{path}: URLs are not fetched; download the image, then pass its path or its bytes")
    # A lone dash would mean standard input.
    return find_inputs(["./-" if path == "-" else path], io.BytesIO())


def _from_pillow(image: Image.Image, label: str) -> Input:
    """The image as a PNG: a lossless copy, upright."""
    try:
        image = upright(_decoded(image))
        buffer = io.BytesIO()
        if image.mode in _WITH_ALPHA:
            image = image.convert(_WITH_ALPHA[image.mode])
        image = image if image.mode in _PNG_MODES else to_rgb(image)
        image.save(buffer, "PNG", compress_level=1, exif=b"")
    except Exception as error:  # a file that is first read here, by parsers that raise anything
        return Input(label, None, f"not a readable image ({one_line(error)})")
    return Input(label, buffer.getvalue)


def _decoded(image: Image.Image) -> Image.Image:
    """The image with its pixels; those of a file that was only opened, by the way of all files."""
    file = getattr(image, "fp", None)
    if file is not None and getattr(image, "tile", None) and not image.tell():
        place = file.tell()
        file.seek(0)
        try:
            opened = open_image(file.read(), max_megapixels=_ANY_SIZE)
        finally:
            file.seek(place)
        if sorted(opened.size) == sorted(image.size):  # not where `draft` was called, for one
            return opened
    image.load()
    return image


def _unknown(image: object) -> UserError:
    return UserError(
        f"{type(image).__name__}: not an image; expected a path, bytes, a PIL image or uint8 [H, W, 3]"
    )
