"""One codec policy for every image, so that a detector cannot learn the container.

GenImage's fakes are lossless squares, its photographs JPEGs of every size. Re-encoding
all alike removes the container but not the *history*: a photograph has been through JPEG
once more. So the default policy first codes a losslessly stored source at its native
size, with a quality and subsampling drawn from those of the lossy sources.

The policy is stored in the manifest and in every checkpoint, so that prediction repeats it.
"""

import io
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from PIL import Image

from dataio.core.errors import UserError
from dataio.images.opening import (
    MEGAPIXELS,
    Undecodable,
    complaint_of,
    failing_as_undecodable,
    open_header,
    open_image,
    to_rgb,
    upright,
)
from dataio.images.stored import draw_history, stored_lossless
from dataio.images.training_decoder import training_fault
from dataio.images.transparency import Transparency, alpha_of

PRESETS = ("default", "reference", "native-crop", "keep")
_MOST_PIXELS = 2**25  # of a resized image; a line of one pixel would otherwise use up the memory
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff"}


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
        transparency: see `to_rgb`; "drop" where a policy of an earlier version does not say.
    """

    preset: str
    resize: Literal["shortest", "squash", "none", "keep"]
    size: int = 256
    quality: int = 95
    subsampling: int = 0
    match_history: bool = False
    history: dict[str, int] | None = None
    max_megapixels: int = MEGAPIXELS
    transparency: Transparency = "drop"

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.max_megapixels == MEGAPIXELS:  # as in plans and manifests from before it was a setting
            del values["max_megapixels"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CodecPolicy":
        return cls(**values)


def preset_policy(name: str, size: int | None = None, max_megapixels: int = MEGAPIXELS) -> CodecPolicy:
    """One of PRESETS, with its side overridden by `size` where given, and a limit of the sources' size.

    Raises:
        UserError: an unknown preset, or a size or limit that makes no sense.
    """
    if max_megapixels < 1:
        raise UserError(f"codec.max_megapixels {max_megapixels}: expected at least 1")
    policies = {
        "default": CodecPolicy(preset="default", resize="shortest", match_history=True, transparency="white"),
        # What the reference project did: squash, Pillow's default quality, no history, no alpha.
        "reference": CodecPolicy(preset="reference", resize="squash", quality=75, subsampling=2),
        "native-crop": CodecPolicy(
            preset="native-crop", resize="none", match_history=True, transparency="white"
        ),
        "keep": CodecPolicy(preset="keep", resize="keep", transparency="white"),
    }
    if name not in policies:
        raise UserError(f"expected one of {', '.join(PRESETS)}", field="codec.preset", value=name)
    policy = replace(policies[name], max_megapixels=max_megapixels)
    if size is None:
        return policy
    if name == "keep" or not 8 <= size <= 8192:
        raise UserError(
            "expected 8 to 8192 pixels, and a preset other than keep", field="codec.size", value=size
        )
    return replace(policy, size=size)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes for the shard, their extension, the size in pixels, and a warning or "".

    The warning is of a file that is used nevertheless: a strict decoder's complaint about data
    that cost no pixel, dropped transparency, a file that could not be kept as it is.
    """

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


def open_source(source: bytes, policy: CodecPolicy) -> Image.Image:
    """`open_image` as `policy` needs it: within its limit, and very large JPEGs at a smaller scale.

    Raises:
        Undecodable: see `open_image`.
    """
    shortest = policy.size if policy.resize in ("shortest", "squash") else None
    return open_image(source, max_megapixels=policy.max_megapixels, shortest=shortest)


@failing_as_undecodable()
def encode(source: bytes, policy: CodecPolicy, image: Image.Image | None = None) -> Encoded:
    """Bring one source under the policy; a pure function of its arguments.

    EXIF orientation is applied once, here. "keep" keeps the bytes that the training decoder shows
    as Pillow does, upright and on white; of other files it makes a PNG of that picture and warns.

    Args:
        image: the source as `open_source` gives it, where that has been done already.

    Raises:
        Undecodable: see `open_image` and `to_rgb`; also what `policy` cannot resize.
    """
    image = open_source(source, policy) if image is None else image
    warning = complaint_of(image)
    if policy.transparency == "drop" and alpha_of(image) is not None:
        warning = warning or "transparency is dropped, so that hidden colors count"
    if policy.resize == "keep":
        return _keep(source, policy, image, warning)
    image = upright(image)
    if policy.resize == "squash":
        if image.mode.startswith(("I", "F")):  # by the range of all values, not of resampled ones
            image = to_rgb(image, policy.transparency)
        # The reference resized before converting, so palette images are resized by nearest.
        image = image.resize((policy.size, policy.size), Image.Resampling.BICUBIC)
        image = to_rgb(image, policy.transparency)
    else:
        image = to_rgb(image, policy.transparency)
        if policy.match_history and policy.history and stored_lossless(source):
            once = _jpeg(image, *draw_history(source, policy.history))
            image = open_header(once, policy.max_megapixels)
        image = _shape(image, policy)
    return Encoded(
        _jpeg(image, policy.quality, policy.subsampling), "jpg", image.width, image.height, warning
    )


def _keep(source: bytes, policy: CodecPolicy, image: Image.Image, warning: str) -> Encoded:
    kind = image.format or ""
    if kind not in _EXTENSIONS:
        fault = f"format {kind} is not kept"
    else:
        fault = training_fault(source, image, policy.transparency)
    if not fault:
        return Encoded(source, _EXTENSIONS[kind], image.width, image.height, warning)
    picture, buffer = to_rgb(upright(image), policy.transparency).copy(), io.BytesIO()
    picture.info = {}  # it may name a transparent color, which PNG would take over
    picture.save(buffer, "PNG", compress_level=1)
    warning = "; ".join(filter(None, [warning, f"re-coded as PNG: {fault}"]))
    return Encoded(buffer.getvalue(), "png", picture.width, picture.height, warning)


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
