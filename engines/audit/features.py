"""Features of an image that do not depend on its content: its container, and simple statistics.

Container features come from the file's headers alone. Pixel statistics are taken on a
bounded center crop, so that they cost the same for every image. A detector that relies on
them has learned the origin of a file, not its content.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from scipy.fft import dctn
from scipy.stats import skew

from dataio.images.opening import failing_as_undecodable, open_image, to_rgb
from dataio.images.stored import stored_lossless
from dataio.sharding.duplicates import image_fingerprint

_Float = NDArray[np.float64]

CROP = 256  # pixels: the largest side of the measured crop; a multiple of JPEG's 8
SPECTRUM_BINS = 16  # of the radial spectrum, from 0 to Nyquist
_LEAST_SIDE = 16  # pixels: the least side for a spectrum
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MODES = ("RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "I;16", "I", "F", "YCbCr")
_BITS = {"1": 1, "I;16": 16, "I": 32, "F": 32}
_METADATA = ("exif", "icc_profile", "xmp", "comment")

# {family: its features}; reasons name families.
CONTAINER = {
    "format": ("format", "lossless", "mode", "bits", "animated"),
    "dimensions": ("width", "height", "aspect", "shortest"),
    "quantisation tables": ("luminance_mean", "luminance_first", "chroma_mean", "tables"),
    "chroma subsampling": ("subsampling",),
    "JPEG header": ("progressive", "jfif", "density"),
    "metadata": _METADATA,
}
# Only JPEG files have these; probed on other files too, they would only repeat the format.
JPEG_ONLY = ("quantisation tables", "chroma subsampling", "JPEG header")
PIXELS = {
    "bytes per pixel": ("bytes_per_pixel",),
    "colour": (
        *(f"{moment}_{channel}" for moment in ("mean", "deviation", "skew") for channel in "rgb"),
        *("correlation_rg", "correlation_rb", "correlation_gb"),
    ),
    "radial spectrum": tuple(f"power_{number:02d}" for number in range(SPECTRUM_BINS)),
    "resize factor": ("energy_above_half", "energy_above_three_quarters", "resampling_peak", "resampling_at"),
    "JPEG history": (
        "blockiness_own_grid",
        "blockiness_other_grid",
        "comb_peak",
        "comb_at",
        "empty_high_frequencies",
    ),
}
CONTAINER_NAMES = tuple(name for names in CONTAINER.values() for name in names)
PIXEL_NAMES = tuple(name for names in PIXELS.values() for name in names)


@dataclass(frozen=True, slots=True)
class Measured:
    """The features of one image.

    Attributes:
        container, pixels: float64 [CONTAINER_NAMES] and [PIXEL_NAMES], nan where a feature
            does not apply.
        fingerprint: its `dataio.sharding.duplicates.image_fingerprint`.
    """

    container: _Float
    pixels: _Float
    is_jpeg: bool
    fingerprint: tuple[tuple[int, int], int, bool]


@failing_as_undecodable()
def measure_image(data: bytes) -> Measured:
    """Measure one encoded image.

    Raises:
        dataio.images.opening.Undecodable: see `open_image`.
    """
    image = open_image(data)
    rgb = to_rgb(image)
    values = {"bytes_per_pixel": len(data) / (rgb.width * rgb.height), **pixel_features(_center(rgb))}
    pixels = np.array([values.get(name, np.nan) for name in PIXEL_NAMES])
    headers = {**container_features(image), "lossless": float(bool(stored_lossless(data)))}
    container = np.array([headers.get(name, np.nan) for name in CONTAINER_NAMES])
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)  # a phone's MPO is one too
    return Measured(container, pixels, is_jpeg, image_fingerprint(rgb))


def container_features(image: Image.Image) -> dict[str, float]:
    """Features of the headers of an image as `open_image` gives it; names that do not apply are left out.

    "lossless" is not among them: it needs the file.
    """
    info, (width, height) = image.info, image.size
    values: dict[str, float] = {
        # A phone's MPO is a JPEG with more pictures behind it.
        "format": _number("JPEG" if image.format == "MPO" else image.format or "", _FORMATS),
        "mode": _number(image.mode, _MODES),
        "bits": _BITS.get(image.mode, 8),
        "animated": bool(getattr(image, "is_animated", False)),
        "width": width,
        "height": height,
        "aspect": width / height,
        "shortest": min(width, height),
        **{name: name in info for name in _METADATA},
    }
    values["exif"] = "exif" in info or _has_exif(image)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        tables = [np.asarray(table, np.float64) for table in image.quantization.values()]
        values |= {
            "luminance_mean": float(tables[0].mean()),
            "luminance_first": float(tables[0][0]),
            "chroma_mean": float(tables[1].mean()) if len(tables) > 1 else np.nan,
            "tables": len(tables),
            "subsampling": JpegImagePlugin.get_sampling(image),
            "progressive": bool(info.get("progressive") or info.get("progression")),
            "jfif": "jfif" in info,
            "density": float(info.get("dpi", (0, 0))[0]),
        }
    return {name: float(value) for name, value in values.items()}


def _has_exif(image: Image.Image) -> bool:
    try:
        return len(image.getexif()) > 0
    except Exception:  # a block that no parser can read is one
        return True


def _number(name: str, known: tuple[str, ...]) -> int:
    return known.index(name) if name in known else len(known)


def readable_value(name: str, value: float) -> float | str:
    """A feature's value for a report: the name behind a number, or four digits."""
    names = {"format": _FORMATS, "mode": _MODES}.get(name)
    if names is None:
        return round(value, 4)
    return names[int(value)] if value < len(names) else "other"


def _center(image: Image.Image) -> NDArray[np.uint8]:
    """The center, uint8 [H, W, 3] of at most CROP a side, on the file's own grid of 8 x 8 blocks."""
    width, height = (min(side, CROP) for side in image.size)
    left, top = ((image.width - width) // 16 * 8, (image.height - height) // 16 * 8)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def pixel_features(crop: NDArray[np.uint8]) -> dict[str, float]:
    """Colour moments, spectrum, cues of resampling and of JPEG compression.

    Args:
        crop: uint8 [H, W, 3], its corner on the file's grid of 8 x 8 blocks.

    Returns:
        values by name; those that a crop under 16 pixels cannot give are left out.
    """
    values = _color(crop)
    # Rec. 601 luma, which is what JPEG codes.
    luma = crop.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    if min(luma.shape) >= _LEAST_SIDE:
        values |= _spectrum(luma)
        values |= _resampling(luma)
        values |= _history(luma)
    return values


def _color(crop: NDArray[np.uint8]) -> dict[str, float]:
    flat = crop.reshape(-1, 3).astype(np.float64)
    means, deviations = flat.mean(0), flat.std(0)
    centered = (flat - means) / np.maximum(deviations, 1e-9)
    # A channel of one value has no skewness; SciPy warns of almost such ones.
    skews = np.where(deviations > 1e-3, skew(centered), 0.0) if (deviations > 1e-3).all() else np.zeros(3)
    values = {}
    for number, name in enumerate("rgb"):
        values[f"mean_{name}"] = float(means[number])
        values[f"deviation_{name}"] = float(deviations[number])
        values[f"skew_{name}"] = float(skews[number])
    for channel, other in ((0, 1), (0, 2), (1, 2)):
        values[f"correlation_{'rgb'[channel]}{'rgb'[other]}"] = float(
            np.mean(centered[:, channel] * centered[:, other])
        )
    return values


@lru_cache(maxsize=8)
def _rings(shape: tuple[int, int]) -> tuple[_Float, NDArray[np.int64], _Float]:
    """Hann window [H, W], ring number of each frequency [H, W] (SPECTRUM_BINS: beyond Nyquist), radius."""
    window = np.outer(np.hanning(shape[0]), np.hanning(shape[1]))
    fy, fx = np.fft.fftfreq(shape[0])[:, None] * 2, np.fft.fftfreq(shape[1])[None, :] * 2
    radius = np.hypot(fy, fx)
    rings = np.minimum(np.ceil(radius * SPECTRUM_BINS).astype(np.int64) - 1, SPECTRUM_BINS)
    return window, np.where(radius == 0, SPECTRUM_BINS, rings), radius


def _spectrum(luma: _Float) -> dict[str, float]:
    """Log of the mean power in rings of equal width, 0 to Nyquist, and the share of high frequencies."""
    window, rings, radius = _rings((luma.shape[0], luma.shape[1]))
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2 / np.sum(window**2)
    counts = np.bincount(rings.ravel(), minlength=SPECTRUM_BINS + 1)[:SPECTRUM_BINS]
    sums = np.bincount(rings.ravel(), power.ravel(), SPECTRUM_BINS + 1)[:SPECTRUM_BINS]
    values = {
        f"power_{number:02d}": float(np.log10(sums[number] / counts[number] + 1e-4))
        for number in range(SPECTRUM_BINS)
        if counts[number]
    }
    total = power[(radius > 0) & (radius <= 1)].sum() + 1e-9
    for name, least in (("energy_above_half", 0.5), ("energy_above_three_quarters", 0.75)):
        values[name] = float(np.log10(power[(radius > least) & (radius <= 1)].sum() / total + 1e-9))
    return values


def _resampling(luma: _Float) -> dict[str, float]:
    """Gallagher's cue (2005): interpolation makes the second difference's size periodic.

    The strongest line in the spectrum of its mean along rows and columns, in units of that
    spectrum's median, and where it lies (cycles per pixel). Multiples of 1/8, which JPEG
    makes, are left out.
    """
    best = (0.0, 0.0)
    for picture in (luma, luma.T):
        second = np.abs(2 * picture[:, 1:-1] - picture[:, :-2] - picture[:, 2:]).mean(0)
        lines = np.abs(np.fft.rfft((second - second.mean()) * np.hanning(len(second))))
        where = np.fft.rfftfreq(len(second))
        away = np.abs(where * 8 - np.round(where * 8)) * len(second) / 8
        chosen = (where > 0.06) & (away > 1.5)
        if chosen.any():
            strength = lines / (np.median(lines[chosen]) + 1e-9)
            peak = int(np.argmax(np.where(chosen, strength, 0)))
            best = max(best, (float(strength[peak]), float(where[peak])))
    return {"resampling_peak": float(np.log10(best[0] + 1e-3)), "resampling_at": best[1]}


def _history(luma: _Float) -> dict[str, float]:
    """Cues of JPEG compression, also of one before a crop or before another compression.

    Steps across the borders of 8 x 8 blocks against other steps (Fan and de Queiroz 2003), on
    the file's own grid and on any other; the comb that quantisation leaves in the histogram
    of a DCT coefficient (Lukáš and Fridrich 2003), as the strongest line of its spectrum; the
    share of high-frequency coefficients that are zero.
    """
    own_grid, other_grids = [], []
    for picture in (luma, luma.T):
        steps = np.abs(np.diff(picture, axis=1)).mean(0)
        # Step i lies between columns i and i + 1, so those at 7, 15, ... cross the own grid.
        phases = np.array([steps[phase::8].mean() for phase in range(8)])
        relative = phases / (phases.mean() + 1e-6)
        own_grid.append(relative[7])
        other_grids.append(relative[:7].max())
    height, width = (side // 8 * 8 for side in luma.shape)
    blocks = (luma[:height, :width] - 128).reshape(height // 8, 8, width // 8, 8).swapaxes(1, 2)
    coefficients = dctn(blocks, axes=(2, 3), norm="ortho")
    peaks = []
    for row, column in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        bins = np.round(coefficients[:, :, row, column]).astype(np.int64).ravel()
        counts = np.bincount(np.clip(bins, -64, 64) + 64, minlength=129)[1:-1]
        lines = np.abs(np.fft.rfft(counts - counts.mean()))[
            12:
        ]  # lower frequencies are the histogram's own shape
        number = int(np.argmax(lines))
        peaks.append((float(lines[number] / (counts.sum() + 1.0)), (number + 12) / len(counts)))
    peak, at = np.mean([p[0] for p in peaks]), np.median([p[1] for p in peaks])
    high = coefficients[:, :, *np.nonzero(np.add.outer(np.arange(8), np.arange(8)) >= 9)]
    return {
        "blockiness_own_grid": float(np.mean(own_grid)),
        "blockiness_other_grid": float(np.mean(other_grids)),
        "comb_peak": float(peak),
        "comb_at": float(at),
        "empty_high_frequencies": float(np.mean(np.abs(high) < 0.5)),
    }
