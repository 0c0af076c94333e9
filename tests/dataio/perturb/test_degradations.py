"""Each degradation does what it says, by an independent measure; the same seed gives the same bytes."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.opening import Undecodable
from dataio.images.stored import jpeg_quality
from dataio.perturb.degradations import (
    CHAINED,
    FAMILIES,
    GENIMAGE,
    MAX_CHAIN,
    Draws,
    Operation,
    check_operation,
    degrade,
    draw_chain,
)


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)


def noisy(width=160, height=120, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def apply(name, severity, source=None, seed=0, key="a.png"):
    return degrade(encoded(noisy()) if source is None else source, [Operation(name, severity)], seed, key)


@pytest.mark.parametrize("quality", [30, 50, 65, 90, 95])
def test_jpeg_has_the_quality_and_subsampling_that_its_tables_say(quality):
    found = jpeg_quality(apply("jpeg", quality))
    assert found is not None and (found.quality, found.exact, found.subsampling) == (quality, True, 2)


def test_webp_is_lossy_and_smaller_at_lower_quality():
    made = {quality: apply("webp", quality) for quality in (30, 60, 90)}
    for data in made.values():
        assert data[8:16] == b"WEBPVP8 "  # not VP8L, the lossless kind
    assert len(made[30]) < len(made[60]) < len(made[90])


@pytest.mark.parametrize("sigma", [1.0, 3.0, 5.0])
def test_blur_lowers_a_frequency_by_the_gaussians_factor(sigma):
    # A cosine along x stays one, with its amplitude times exp(-(sigma * omega)^2 / 2).
    size, cycles = 256, round(256 * 0.9 / (2 * np.pi * sigma))
    omega = 2 * np.pi * cycles / size
    wave = 127.5 + 120 * np.cos(omega * (np.arange(size) + 0.5))
    source = encoded(np.broadcast_to(wave[None, :, None], (64, size, 3)).round().astype(np.uint8))
    result = decoded(apply("blur", sigma, source))[32, :, 0]
    inner = result[4 * 5 : -4 * 5]
    assert (inner.max() - inner.min()) / 240 == pytest.approx(np.exp(-((sigma * omega) ** 2) / 2), abs=0.01)
    assert result.mean() == pytest.approx(127.5, abs=1)


def test_noise_has_the_standard_deviation_and_no_mean():
    grey = encoded(np.full((200, 200, 3), 128, np.uint8))
    for sigma in (2.0, 10.0):
        difference = decoded(apply("noise", sigma, grey)) - 128
        assert difference.std() == pytest.approx(np.sqrt(sigma**2 + 1 / 12), rel=0.01)
        assert abs(difference.mean()) < 5 * sigma / np.sqrt(difference.size)
        # Each channel has its own.
        assert abs(np.corrcoef(difference[..., 0].ravel(), difference[..., 1].ravel())[0, 1]) < 0.03


def test_noise_of_a_curve_differs_by_its_strength_alone():
    grey = encoded(np.full((64, 64, 3), 128, np.uint8))
    weak, strong = (decoded(apply("noise", sigma, grey)) - 128 for sigma in (5.0, 20.0))
    assert np.abs(strong - 4 * weak).max() <= 2.5  # rounding


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.5])
def test_resize_multiplies_both_sides(factor):
    assert decoded(apply("resize", factor)).shape == (120 * factor, 160 * factor, 3)


def test_shrinking_does_not_alias():
    # The finest stripes there are become grey; without antialiasing they would stay stripes.
    stripes = np.broadcast_to(np.array([0, 255], np.uint8)[np.arange(128) % 2, None], (96, 128, 3))
    result = decoded(apply("resize", 0.25, encoded(np.ascontiguousarray(stripes))))
    assert np.abs(result[4:-4, 4:-4] - 127.5).max() < 12


@pytest.mark.parametrize(("name", "side"), [("LR112", 112), ("LR64", 64)])
def test_low_resolution_passes_through_so_many_pixels(name, side):
    operation = GENIMAGE[name]
    source = encoded(noisy(300, 200))
    assert decoded(degrade(source, [operation], 0, "k")).shape == (side, round(side * 1.5), 3)
    small = encoded(noisy(80, 60))
    if side > 60:
        assert degrade(small, [operation], 0, "k") == small


def test_genimages_six_are_those_of_the_paper():
    assert {name: (o.family, o.severity) for name, o in GENIMAGE.items()} == {
        "LR112": ("short_side", 112),
        "LR64": ("short_side", 64),
        "JPEG65": ("jpeg", 65),
        "JPEG30": ("jpeg", 30),
        "blur3": ("blur", 3),
        "blur5": ("blur", 5),
    }


def test_crop_is_a_part_of_the_image_at_a_place_of_its_own():
    pixels = noisy()
    source, places = encoded(pixels), set()
    for number in range(12):
        part = decoded(apply("crop", 0.5, source, key=f"{number}.png"))
        assert part.shape == (60, 80, 3)
        windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (60, 80))
        found = np.argwhere((windows[..., 0, :8] == part[0, :8, 0]).all(-1))
        top, left = next(p for p in found if np.array_equal(pixels[p[0] :, p[1] :][:60, :80], part))
        places.add((int(top), int(left)))
    assert len(places) > 8
    assert apply("crop", 1, source) == source


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), key=st.text(min_size=1, max_size=12), length=st.integers(1, MAX_CHAIN))
def test_chains_have_the_wanted_number_of_different_operations_within_range(seed, key, length):
    chain = draw_chain(length, seed, key)
    assert len(chain) == length == len({operation.family for operation in chain})
    for operation in chain:
        check_operation(operation, "chain")
        chained = FAMILIES[operation.family].chained
        assert chained is not None and chained[0] <= operation.severity <= chained[1]
    assert chain == draw_chain(length, seed, key)


def test_chains_differ_by_image_and_use_every_family_in_every_place():
    chains = [draw_chain(5, 0, f"{number}") for number in range(300)]
    for place in range(5):
        assert {chain[place].family for chain in chains} == set(CHAINED)
    assert len({tuple(map(str, chain)) for chain in chains}) == 300


def test_a_chain_is_its_operations_one_after_the_other():
    source = encoded(noisy())
    first, second = Operation("blur", 1.0), Operation("jpeg", 80)
    assert degrade(source, [first, second], 3, "k") == degrade(
        degrade(source, [first], 3, "k"), [second], 3, "k"
    )
    reverse = degrade(source, [second, first], 3, "k")
    assert Image.open(io.BytesIO(reverse)).format == "PNG"


@pytest.mark.parametrize("name", FAMILIES)
def test_same_seed_same_bytes_and_only_what_is_drawn_depends_on_it(name):
    severity = {
        "jpeg": 50,
        "webp": 50,
        "resize": 0.7,
        "blur": 1.5,
        "noise": 5,
        "crop": 0.7,
        "short_side": 64,
    }[name]
    one = apply(name, severity, seed=1, key="x")
    assert one == apply(name, severity, seed=1, key="x")
    drawn = name in ("noise", "crop")
    assert (one != apply(name, severity, seed=3, key="x")) == drawn
    assert (one != apply(name, severity, seed=1, key="y")) == drawn


def test_draws_are_uniform_and_never_touch_the_ends():
    values = Draws(0, "k", "n").uniform(100_000)
    assert values.min() > 0 and values.max() < 1
    counts, _ = np.histogram(values, 20, (0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-squared with 19 degrees, p = 0.001
    draws = Draws(0, "k", "n")
    assert np.array_equal(np.concatenate([draws.uniform(40), draws.uniform(60)]), values[:100])


def test_orientation_is_applied_and_no_operation_keeps_the_bytes():
    image = Image.fromarray(noisy(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decoded(apply("jpeg", 90, buffer.getvalue())).shape == (40, 20, 3)
    assert degrade(buffer.getvalue(), [], 0, "k") == buffer.getvalue()
    with pytest.raises(Undecodable):
        apply("jpeg", 90, b"no image")


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("jpeg", 0, r"where\.jpeg: severity 0, expected a whole number from 1 to 100"),
        ("jpeg", 90.5, "whole number"),
        ("resize", 9, r"expected a number from 0\.05 to 4"),
        ("blur", float("nan"), "blur: severity nan"),
        ("sepia", 1, "no operation 'sepia'; there are jpeg, webp"),
    ],
)
def test_severities_out_of_range_are_one_line(name, severity, message):
    with pytest.raises(UserError, match=message) as caught:
        check_operation(Operation(name, severity), "where")
    assert "\n" not in str(caught.value)
