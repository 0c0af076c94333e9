"""One codec policy for every image, so that a detector cannot learn the container.

GenImage's fakes are lossless squares, its photographs JPEGs of every size. Re-encoding
all alike removes the container but not the *history*: a photograph has been through JPEG
once more. So the default policy first codes a losslessly stored source at its native
size, with a quality and subsampling drawn from those of the lossy sources.

The policy is stored in the manifest and in every checkpoint, so that prediction repeats it.
"""

import hashlib
import io
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin

from dataio.core.errors import UserError
from dataio.images.opening import MEGAPIXELS, Undecodable, image_orientation, open_image, to_rgb, upright

PRESETS = ("default", "reference", "native-crop", "keep")
LOSSLESS = frozenset(["PNG", "BMP", "TIFF", "GIF", "PPM"])
_MOST_PIXELS = 2**25  # of a resized image; a line of one pixel would otherwise use up the memory
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff"}


@dataclass(frozen=True, kw_only=True)
class CodecPolicy:
    """How every source becomes the bytes in a shard.

    Attributes:
        preset: the name it came from.
        resize: "shortest" (shortest side to `size`, then center crop), "squash" (to a
            square, aspect ignored), "none" (center crop to `size`, or as it is where
            smaller; no resampling), "keep" (the source's bytes).
        size: side of the square result, pixels.
        quality, subsampling: of the final baseline JPEG; Pillow's numbers (subsampling
            0 is 4:4:4, 2 is 4:2:0).
        match_history: code lossless sources once as the lossy ones were.
        history: {"quality:subsampling": count} of the lossy sources; None until planned,
            and where there are none.
        max_megapixels: larger sources are rejected.
    """

    preset: str
    resize: Literal["shortest", "squash", "none", "keep"]
    size: int = 256
    quality: int = 95
    subsampling: int = 0
    match_history: bool = False
    history: dict[str, int] | None = None
    max_megapixels: int = MEGAPIXELS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CodecPolicy":
        return cls(**values)


def preset_policy(name: str, size: int | None = None) -> CodecPolicy:
    """One of PRESETS, with its side overridden by `size` where given.

    Raises:
        UserError: an unknown preset, or a size that makes no sense.
    """
    policies = {
        "default": CodecPolicy(preset="default", resize="shortest", match_history=True),
        # What the reference project did: squash, Pillow's default quality, no history.
        "reference": CodecPolicy(preset="reference", resize="squash", quality=75, subsampling=2),
        "native-crop": CodecPolicy(preset="native-crop", resize="none", match_history=True),
        "keep": CodecPolicy(preset="keep", resize="keep"),
    }
    if name not in policies:
        raise UserError(f"expected one of {', '.join(PRESETS)}", field="codec.preset", value=name)
    if size is None:
        return policies[name]
    if name == "keep" or not 8 <= size <= 8192:
        raise UserError(
            "expected 8 to 8192 pixels, and a preset other than keep", field="codec.size", value=size
        )
    return replace(policies[name], size=size)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes for the shard, their extension, the size in pixels, and a warning or ""."""

    data: bytes
    extension: str
    width: int
    height: int
    warning: str


def _jpeg(image: Image.Image, quality: int, subsampling: int) -> bytes:
    buffer = io.BytesIO()
    # An empty comment, since Pillow would copy the source's, which photographs have more often.
    image.save(
        buffer,
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=False,
        optimize=False,
        comment=b"",
    )
    return buffer.getvalue()


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


def _strict_complaint(source: bytes) -> str:
    """What a strict JPEG decoder says of bytes that Pillow accepted, or ""."""
    try:
        simplejpeg.decode_jpeg(source, strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def encode(source: bytes, policy: CodecPolicy, image: Image.Image | None = None) -> Encoded:
    """Bring one source under the policy; a pure function of its arguments.

    EXIF orientation is applied once, here, except under "keep", which warns of it.

    Args:
        image: the source as `open_image` gives it, where that has been done already.

    Raises:
        Undecodable: see `open_image`; also what `policy` cannot keep or resize.
    """
    image = open_image(source, max_megapixels=policy.max_megapixels) if image is None else image
    kind = image.format or ""
    warning = _strict_complaint(source) if kind == "JPEG" and image.mode in ("RGB", "L") else ""
    orientation = image_orientation(image)
    if policy.resize == "keep":
        if orientation != 1:
            warning = warning or f"EXIF orientation {orientation} is not applied under codec preset keep"
        if kind not in _EXTENSIONS:
            raise Undecodable(f"format {kind} cannot be kept; use another codec preset")
        return Encoded(source, _EXTENSIONS[kind], image.width, image.height, warning)
    image = upright(image)
    if policy.resize == "squash":
        if image.mode.startswith(("I", "F")):  # by the range of all values, not of resampled ones
            image = to_rgb(image)
        # The reference resized before converting, so palette images are resized by nearest.
        image = image.resize((policy.size, policy.size), Image.Resampling.BICUBIC)
        image = to_rgb(image)
    else:
        image = to_rgb(image)
        if policy.match_history and policy.history and kind in LOSSLESS:
            image = Image.open(io.BytesIO(_jpeg(image, *draw_history(source, policy.history))))
        image = _shape(image, policy)
    return Encoded(
        _jpeg(image, policy.quality, policy.subsampling), "jpg", image.width, image.height, warning
    )


def _shape(image: Image.Image, policy: CodecPolicy) -> Image.Image:
    if policy.resize == "shortest" and min(image.size) != policy.size:
        scale = policy.size / min(image.size)
        resized = tuple(max(policy.size, round(side * scale)) for side in image.size)
        if resized[0] * resized[1] > _MOST_PIXELS:
            raise Undecodable(f"{image.width} x {image.height} pixels are too long and thin to be resized")
        # Pillow's bicubic widens its support when shrinking, which is the antialiasing.
        image = image.resize((resized[0], resized[1]), Image.Resampling.BICUBIC)
    width, height = (min(side, policy.size) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@lru_cache
def _luminance_tables() -> dict[tuple[int, ...], tuple[int, tuple[int, ...]]]:
    """{luminance table: (quality, chrominance table)} of the IJG encoder, asked of the encoder itself."""
    tables = {}
    for quality in range(1, 101):
        buffer = io.BytesIO(_jpeg(Image.new("RGB", (8, 8)), quality, 0))
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
    """Read the quality from a JPEG's header, without decoding; None for anything else."""
    try:
        with Image.open(io.BytesIO(source)) as image:
            if image.format != "JPEG":
                return None
            quantization = image.quantization  # type: ignore[attr-defined]
            table, chroma = tuple(quantization[0]), [tuple(quantization[n]) for n in quantization if n]
            sampling = JpegImagePlugin.get_sampling(image)
    except (OSError, ValueError, SyntaxError, KeyError):
        return None
    tables = _luminance_tables()
    nearest = table
    if table not in tables:
        luminance = np.array(table)
        nearest = min(tables, key=lambda known: float(np.abs(np.array(known) - luminance).mean()))
    quality, its_chroma = tables[nearest]
    exact = nearest == table and all(other in (its_chroma, table) for other in chroma)
    return JpegQuality(quality, exact, sampling if sampling in (0, 1, 2) else 2)


def jpeg_history(source: bytes) -> str | None:
    """Read "quality:subsampling" from a JPEG's header; None for anything else.

    Tables that no IJG quality has count as the nearest, see `JpegQuality`.
    """
    quality = jpeg_quality(source)
    return f"{quality.quality}:{quality.subsampling}" if quality else None
