"""Audit features: each finds what was put into a constructed image, and nothing where it was not."""

import io

import numpy as np
import pytest
from PIL import Image

from dataio.images.opening import Undecodable, open_image
from engines.audit.features import (
    CONTAINER_NAMES,
    PIXEL_NAMES,
    SPECTRUM_BINS,
    container_features,
    measure_image,
    pixel_features,
    readable_value,
)


def noise(side=128, seed=0):
    return np.random.default_rng(seed).normal(128, 30, (side, side, 3)).clip(0, 255).astype(np.uint8)


def saved(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def through_jpeg(pixels, quality):
    return np.asarray(Image.open(io.BytesIO(saved(pixels, "JPEG", quality=quality, subsampling=0))))


def smooth(side=128, seed=0):
    """A picture whose steps are small, so that block borders show."""
    small = Image.fromarray(noise(side // 8, seed))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def test_container_features_are_what_the_file_was_written_with():
    exif = Image.Exif()
    exif[0x0110] = "camera"
    wide = noise()[:64]
    data = saved(wide, "JPEG", quality=75, subsampling=2, progressive=True, exif=exif, comment=b"by hand")
    found = container_features(open_image(data))
    assert (
        readable_value("format", found["format"]) == "JPEG" and readable_value("mode", found["mode"]) == "RGB"
    )
    assert (found["width"], found["height"], found["aspect"], found["shortest"]) == (128, 64, 2, 64)
    assert (found["subsampling"], found["progressive"], found["exif"], found["comment"]) == (2, 1, 1, 1)
    assert found["luminance_first"] == 8 and found["tables"] == 2  # the IJG's 16, halved
    plain = container_features(open_image(saved(wide, "JPEG", quality=75, subsampling=0)))
    assert (plain["subsampling"], plain["progressive"], plain["exif"], plain["comment"]) == (0, 0, 0, 0)
    lossless = container_features(open_image(saved(wide, "PNG")))
    assert readable_value("format", lossless["format"]) == "PNG" and "luminance_mean" not in lossless


def test_every_feature_is_measured_on_a_jpeg_and_the_jpegs_own_are_missing_elsewhere():
    jpeg = measure_image(saved(noise(), "JPEG"))
    assert jpeg.is_jpeg and np.isfinite(jpeg.container).all() and np.isfinite(jpeg.pixels).all()
    assert len(jpeg.container) == len(CONTAINER_NAMES) and len(jpeg.pixels) == len(PIXEL_NAMES)
    png = measure_image(saved(noise(), "PNG"))
    missing = {name for name, value in zip(CONTAINER_NAMES, png.container, strict=True) if np.isnan(value)}
    assert not png.is_jpeg and "subsampling" in missing and "width" not in missing
    assert len(saved(noise(), "PNG")) / 128**2 == png.pixels[PIXEL_NAMES.index("bytes_per_pixel")]


def test_the_container_is_read_from_the_content():
    lossless = CONTAINER_NAMES.index("lossless")
    values = {
        "png": measure_image(saved(noise(), "PNG")),
        "webp": measure_image(saved(noise(), "WEBP", quality=80)),
        "lossless webp": measure_image(saved(noise(), "WEBP", lossless=True)),
        "mpo": measure_image(saved(noise(), "MPO", save_all=True, append_images=[Image.fromarray(noise())])),
    }
    found = {name: (one.container[lossless], one.is_jpeg) for name, one in values.items()}
    assert found == {"png": (1, False), "webp": (0, False), "lossless webp": (1, False), "mpo": (0, True)}
    mpo = values["mpo"].container
    assert readable_value("format", mpo[CONTAINER_NAMES.index("format")]) == "JPEG"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [1, 8, 16, 33])
def test_small_and_plain_images_give_what_they_can(side):
    found = measure_image(saved(np.full((side, side, 3), 77, np.uint8), "PNG"))
    values = dict(zip(PIXEL_NAMES, found.pixels, strict=True))
    assert values["mean_r"] == 77 and values["deviation_r"] == 0
    assert np.isfinite(values["blockiness_own_grid"]) == (side >= 16)
    assert not np.isinf(found.pixels).any()


def test_damaged_files_are_undecodable():
    for data in (b"", b"no image", saved(noise(), "PNG")[:2000]):
        with pytest.raises(Undecodable):
            measure_image(data)


def test_colour_moments_are_numpys():
    pixels = noise(seed=4)
    found, red = pixel_features(pixels), pixels[..., 0].astype(float)
    assert found["mean_r"] == pytest.approx(red.mean()) and found["deviation_r"] == pytest.approx(red.std())
    expected = np.corrcoef(pixels.reshape(-1, 3).T)
    assert found["correlation_rb"] == pytest.approx(expected[0, 2], abs=1e-6)


def test_a_wave_shows_in_the_ring_of_its_frequency():
    columns = np.arange(128)
    for share in (0.2, 0.55, 0.9):  # of Nyquist
        wave = 128 + 60 * np.sin(np.pi * share * columns)
        found = pixel_features(np.tile(wave[None, :, None], (128, 1, 3)).round().astype(np.uint8))
        powers = [found[f"power_{number:02d}"] for number in range(SPECTRUM_BINS)]
        assert int(np.argmax(powers)) == int(share * SPECTRUM_BINS)


def test_enlarging_takes_high_frequencies_and_leaves_a_line_where_gallagher_says():
    plain = pixel_features(noise())
    small = Image.fromarray(noise(85))
    large = pixel_features(np.asarray(small.resize((128, 128), Image.Resampling.BILINEAR)))
    assert large["energy_above_half"] < plain["energy_above_half"] - 0.3
    assert large["resampling_peak"] > plain["resampling_peak"] + 0.3
    # 85 / 128 of a cycle per pixel, which folds back to its difference from one.
    assert large["resampling_at"] == pytest.approx(1 - 85 / 128, abs=0.01)


def test_jpeg_leaves_blocks_on_its_own_grid_and_on_another_after_a_crop():
    before, after = smooth(), through_jpeg(smooth(), 20)
    assert pixel_features(after)["blockiness_own_grid"] > pixel_features(before)["blockiness_own_grid"] + 0.3
    shifted = pixel_features(np.ascontiguousarray(after[3:, 5:]))
    assert shifted["blockiness_other_grid"] > pixel_features(before[3:, 5:])["blockiness_other_grid"] + 0.3
    assert shifted["blockiness_own_grid"] < pixel_features(after)["blockiness_own_grid"] - 0.3


def test_an_earlier_jpeg_shows_under_a_later_one():
    once = pixel_features(through_jpeg(noise(), 95))
    twice = pixel_features(through_jpeg(through_jpeg(noise(), 60), 95))
    assert twice["comb_peak"] > once["comb_peak"] + 0.2
    assert twice["empty_high_frequencies"] > once["empty_high_frequencies"] + 0.2


def test_only_a_bounded_centre_is_measured_and_on_the_files_grid():
    large = np.full((700, 1000, 3), 10, np.uint8)
    large[222:478, 372:628] = noise(256)
    found = dict(zip(PIXEL_NAMES, measure_image(saved(large, "PNG")).pixels, strict=True))
    # Corner at (216, 368), the nearest multiples of eight below (222, 372).
    assert found["mean_g"] == pytest.approx(large[216:472, 368:624, 1].mean())
