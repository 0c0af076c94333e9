"""Training augmentation: what is drawn for each sample, and the DALI operators that do it.

Everything random is drawn here, as a pure function of (seed, epoch, position), and handed
to DALI as one row of numbers per sample, `AugmentParams`. DALI's own random operators are not
used: they have state, so a resumed run or another number of processes would see other
pictures. A sample that is not chosen for an operation passes it untouched, bit for bit.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.core.counter_rng import PURPOSE_AUGMENT, uniform

# Float32 [N, RAND + 2 * rand_augment]: what each sample goes through, 0 for not at all.
AugmentParams = NDArray[np.float32]
# Its columns. WEBP, JPEG: quality; BLUR: sigma, pixels; SIDE: pixels in between;
# ERASE: y, x, height, width; from RAND on: operation and sign, once for each of RandAugment's.
WEBP, BLUR, SIDE, JPEG, ERASE, RAND = 0, 1, 2, 3, 4, 8
_BINS = 31  # of RandAugment's magnitudes, 0..30
_OPERATIONS = 14


@dataclass(kw_only=True)
class AugmentConfig:
    """What happens to a training image between its crop and its normalization."""

    rand_augment: int = 0
    """How many of RandAugment's operations each image goes through. Cubuk et al., 2020."""
    rand_magnitude: int = 9
    """Their magnitude, 0..30."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.3, 2.0)
    """Range of its sigma, pixels."""
    resize: float = 0.0
    """Probability of scaling and scaling back."""
    resize_scale: tuple[float, float] = (0.5, 1.5)
    """Range of the factor in between."""
    jpeg: float = 0.0
    """Probability of compression as JPEG (4:2:0), last of all, as on the web."""
    jpeg_quality: tuple[int, int] = (30, 95)
    """Range of its quality, 1..100."""
    webp: float = 0.0
    """Probability of compression as WebP, of the whole image and before the crop; on the host, which costs."""
    webp_quality: tuple[int, int] = (30, 95)
    """Range of its quality, 0..100."""
    erase: float = 0.0
    """Probability that a rectangle is replaced by the mean color. Zhong et al., 2020."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Range of its share of the area."""

    def __post_init__(self) -> None:
        for name in ("blur", "resize", "jpeg", "webp", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"data.augment.{name} is {getattr(self, name)}, expected a probability in [0, 1]"
                )
        for name, least, most in (
            ("blur_sigma", 0.01, 100.0),
            ("resize_scale", 0.05, 10.0),
            ("jpeg_quality", 1, 100),
            ("webp_quality", 0, 100),
            ("erase_area", 0.0, 1.0),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(
                    f"data.augment.{name} is {[low, high]}, expected {least} <= low <= high <= {most}"
                )
        if self.rand_augment < 0 or not 0 <= self.rand_magnitude < _BINS:
            raise ValueError("data.augment.rand_augment must be 0 or more and rand_magnitude in 0..30")

    @property
    def in_pipeline(self) -> bool:
        """Whether DALI has anything to do."""
        return bool(self.rand_augment or self.blur or self.resize or self.jpeg or self.erase)

    @property
    def active(self) -> bool:
        """Whether anything is drawn at all."""
        return bool(self.in_pipeline or self.webp)


def draw_augment_params(
    config: AugmentConfig, size: int, seed: int, epoch: int, position: NDArray[np.int64]
) -> AugmentParams:
    """The parameters of each sample: float32 [N, RAND + 2 * rand_augment], 0 where nothing does.

    Args:
        size: side of the network's input, pixels. position: int64 [N], in the epoch.
    """
    count = iter(range(1000))

    def draw() -> NDArray[np.float64]:
        return uniform(seed, epoch, PURPOSE_AUGMENT, position, next(count))

    def between(span: tuple[float, float]) -> NDArray[np.float64]:
        return span[0] + draw() * (span[1] - span[0])

    def whole(span: tuple[int, int]) -> NDArray[np.float64]:
        return span[0] + np.floor(draw() * (span[1] - span[0] + 1))

    params = np.zeros((len(position), RAND + 2 * config.rand_augment))
    # The draws are numbered by their order here, whether they are used or not.
    params[:, WEBP] = (draw() < config.webp) * (1 + whole(config.webp_quality))  # 0 is a quality
    params[:, BLUR] = (draw() < config.blur) * between(config.blur_sigma)
    side = np.maximum(1, np.rint(size * between(config.resize_scale)))
    params[:, SIDE] = (draw() < config.resize) * side
    params[:, JPEG] = (draw() < config.jpeg) * whole(config.jpeg_quality)
    area, aspect = size * size * between(config.erase_area), np.exp(between((np.log(0.3), -np.log(0.3))))
    height = np.clip(np.rint(np.sqrt(area * aspect)), 1, size)
    width = np.clip(np.rint(np.sqrt(area / aspect)), 1, size)
    top, left = np.floor(draw() * (size - height + 1)), np.floor(draw() * (size - width + 1))
    box = np.stack([top, left, height, width], axis=1)
    params[:, ERASE:RAND] = (draw() < config.erase)[:, None] * box
    for number in range(config.rand_augment):
        params[:, RAND + 2 * number] = np.floor(draw() * _OPERATIONS)
        params[:, RAND + 2 * number + 1] = draw() < 0.5
    return params.astype(np.float32)


def through_webp(encoded: NDArray[np.uint8], code: float) -> NDArray[np.uint8]:
    """The image coded once more as WebP, uint8 [bytes]; DALI has no encoder for it.

    Args:
        code: WEBP's parameter, one more than the quality.
    """
    out = io.BytesIO()
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        image.convert("RGB").save(out, "WEBP", quality=int(code) - 1, method=2)
    return np.frombuffer(out.getvalue(), np.uint8)


# ---- inside the pipeline: DALI turns these functions' `if` into conditions per sample ----


def rand_augment(image: Any, params: Any, config: AugmentConfig, size: int, fill: float) -> Any:
    """RandAugment by DALI's own operations, each sample's chosen by its params; uint8 HWC in and out.

    Args:
        fill: grey level, 0..255, of what shifts and turns uncover.
    """
    from nvidia.dali import fn
    from nvidia.dali import types as dali_types
    from nvidia.dali.auto_aug.core import signed_bin
    from nvidia.dali.auto_aug.core._select import select
    from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

    types: Any = dali_types
    suite = get_rand_augment_suite(max_translate_abs=max(1, round(size * 100 / 224)))
    assert len(suite) == _OPERATIONS
    for number in range(config.rand_augment):
        chosen = fn.cast(params[RAND + 2 * number], dtype=types.INT32)
        sign = fn.cast(params[RAND + 2 * number + 1], dtype=types.INT32)
        magnitude = signed_bin(config.rand_magnitude, random_sign=sign)
        image = select(
            suite, chosen, data=image, magnitude_bin=magnitude, num_magnitude_bins=_BINS, fill_value=fill
        )
    return image


def blur_resize_compress(image: Any, params: Any, config: AugmentConfig, size: int) -> Any:
    """Blur, scale and back, compress; uint8 HWC in and out."""
    from nvidia.dali import fn
    from nvidia.dali import types as dali_types

    types: Any = dali_types
    if config.blur > 0:
        sigma = params[BLUR]
        if sigma > 0:
            image = fn.gaussian_blur(image, sigma=sigma)
    if config.resize > 0:
        side = params[SIDE]
        if side > 0:
            image = fn.resize(
                image, resize_x=side, resize_y=side, interp_type=types.INTERP_LINEAR, antialias=True
            )
            image = fn.resize(image, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    if config.jpeg > 0:
        quality = params[JPEG]
        if quality > 0:
            image = fn.jpeg_compression_distortion(image, quality=fn.cast(quality, dtype=types.INT32))
    return image


def erase(image: Any, params: Any) -> Any:
    """Set each sample's rectangle to zero, which is the mean after normalization; float HWC in and out."""
    from nvidia.dali import fn

    if params[ERASE + 2] > 0:
        image = fn.erase(
            image,
            anchor=params[ERASE : ERASE + 2],
            shape=params[ERASE + 2 : ERASE + 4],
            axis_names="HW",
            fill_value=0.0,
        )
    return image
