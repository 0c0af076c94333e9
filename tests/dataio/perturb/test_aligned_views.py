"""The aligned views, and the estimate of JPEG quality that one of them filters by."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import encode, preset_policy
from dataio.images.opening import Undecodable
from dataio.images.stored import draw_history, jpeg_history, jpeg_quality
from dataio.perturb.aligned_views import (
    Degraded,
    HistoryMatched,
    JpegAll,
    JpegFakes,
    LeftOut,
    SizeMatched,
    history_of,
    smallest_side,
)
from dataio.perturb.degradations import Operation

# Annex K of ITU-T T.81, tables K.1 and K.2, in rows.
LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
CHROMINANCE = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *([[99] * 8] * 4),
]


def libjpeg_table(base, quality):
    """jpeg_quality_scaling and jpeg_add_quant_table of libjpeg's jcparam.c, for baseline."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [min(255, max(1, (value * scale + 50) // 100)) for row in base for value in row]


def pixels(width=64, height=48, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(kind="PNG", array=None, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels() if array is None else array).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def luminance(image):
    return np.asarray(image.convert("L"), np.float64)


@settings(max_examples=200, deadline=None)
@given(quality=st.integers(1, 100), sampling=st.sampled_from([0, 1, 2]), grey=st.booleans())
def test_the_quality_of_libjpegs_tables_is_found_exactly(quality, sampling, grey):
    tables = [libjpeg_table(LUMINANCE, quality), libjpeg_table(CHROMINANCE, quality)]
    array = pixels()[..., 0] if grey else pixels()
    options = {} if grey else {"subsampling": sampling}
    found = jpeg_quality(encoded("JPEG", array, qtables=tables[: 1 if grey else 2], **options))
    assert found is not None and (found.quality, found.exact) == (quality, True)
    assert grey or found.subsampling == sampling


def test_every_quality_is_told_from_every_other():
    found = [jpeg_quality(encoded("JPEG", quality=quality)) for quality in range(1, 101)]
    assert [one.quality for one in found if one and one.exact] == list(range(1, 101))


def test_other_tables_are_near_but_not_exact():
    luminance = libjpeg_table(LUMINANCE, 96)
    luminance[5] += 1
    found = jpeg_quality(encoded("JPEG", qtables=[luminance, libjpeg_table(CHROMINANCE, 96)]))
    assert found is not None and (found.quality, found.exact) == (96, False)
    other_chroma = [libjpeg_table(LUMINANCE, 96), libjpeg_table(CHROMINANCE, 80)]
    found = jpeg_quality(encoded("JPEG", qtables=other_chroma))
    assert found is not None and (found.quality, found.exact) == (96, False)
    assert jpeg_quality(encoded("PNG")) is None and jpeg_quality(b"nothing") is None


def test_raw_is_the_bytes_whatever_they_are():
    assert Degraded()(b"not even an image", "k", True) == b"not even an image"


def test_jpeg_fakes_filters_photographs_and_codes_the_others():
    view = JpegFakes(96)
    kept = encoded("JPEG", quality=96)
    assert view(kept, "k", real=True) == kept
    for source, reason in (
        (encoded("JPEG", quality=95), "another JPEG quality than 96"),
        (encoded("PNG"), "not a JPEG"),
    ):
        with pytest.raises(LeftOut, match=f"^left out: a photograph (of|that is) {reason}"):
            view(source, "k", real=True)
    made = view(encoded("PNG"), "k", real=False)
    assert jpeg_history(made) == "96:2"
    assert jpeg_history(JpegFakes(96, 0)(encoded("PNG"), "k", real=False)) == "96:0"
    again = view(encoded("JPEG", quality=50), "k", real=False)
    assert jpeg_history(again) == "96:2"


def test_jpeg_all_codes_everything():
    for source in (encoded("PNG"), encoded("JPEG", quality=50)):
        assert {jpeg_history(JpegAll(90, 1)(source, "k", real)) for real in (True, False)} == {"90:1"}


def test_history_is_drawn_as_the_codec_draws_it_and_lossy_files_stay():
    view = HistoryMatched({"75:2": 3, "92:0": 1})
    lossy = encoded("JPEG", quality=50)
    assert view(lossy, "k", False) == lossy
    drawn = []
    for seed in range(60):
        source = encoded("PNG", pixels(seed=seed))
        quality, sampling = draw_history(source, view.history)
        drawn.append(jpeg_history(view(source, "k", False)))
        assert drawn[-1] == f"{quality}:{sampling}"
    assert 30 <= drawn.count("75:2") <= 58 and set(drawn) == {"75:2", "92:0"}


def test_views_judge_files_by_content():
    """A phone's MPO is a JPEG, and a lossless WebP is lossless; names are nowhere in it."""
    mpo = encoded("MPO", quality=96, save_all=True, append_images=[Image.fromarray(pixels(seed=1))])
    assert opened(mpo).format == "MPO"
    assert JpegFakes(96)(mpo, "k", real=True) == mpo
    cut = SizeMatched(32)(mpo, "k", True)
    assert opened(cut).format == "JPEG" and jpeg_history(cut) == "96:2"
    view = HistoryMatched({"70:2": 1})
    assert view(mpo, "k", True) == mpo
    for kind, options in (("WEBP", {"lossless": True}), ("TGA", {}), ("QOI", {}), ("JPEG2000", {})):
        assert jpeg_history(view(encoded(kind, **options), "k", False)) == "70:2"
    for source in (encoded("WEBP", quality=80), encoded("TIFF", compression="jpeg")):
        assert view(source, "k", False) == source
    assert history_of([mpo, encoded("WEBP")]) == {"96:2": 1}


def test_a_history_matched_file_ends_under_the_default_policy_as_the_source_itself():
    # The policy would have given the source the same history, and gives a JPEG none.
    history = {"75:2": 3, "92:0": 1}
    policy = preset_policy("default", 32)
    policy = type(policy).from_dict({**policy.to_dict(), "history": history})
    source = encoded("PNG")
    assert encode(HistoryMatched(history)(source, "k", False), policy).data == encode(source, policy).data


def test_history_of_counts_jpegs_only():
    sources = [encoded("JPEG", quality=80), encoded("JPEG", quality=80), encoded("PNG"), b""]
    assert history_of(sources) == {"80:2": 2}
    with pytest.raises(UserError, match="none of the chosen images is a JPEG"):
        history_of([encoded("PNG")])


@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_size_cuts_a_jpeg_on_its_grid_with_its_own_tables(sampling):
    source = encoded("JPEG", pixels(200, 150), quality=83, subsampling=sampling)
    made = SizeMatched(64)(source, "k", True)
    result, whole = opened(made), opened(source)
    assert result.format == "JPEG" and result.size == (64, 64)
    assert jpeg_history(made) == f"83:{sampling}"
    # Luminance: coding again with the same tables on the same grid changes next to nothing.
    # (Subsampled chrominance is smoothed on decoding, so it does change.)
    difference = np.abs(luminance(result) - luminance(whole.crop((64, 32, 128, 96))))
    assert difference.mean() < 0.5
    shifted = whole.crop((65, 33, 129, 97))
    buffer = io.BytesIO()
    shifted.save(buffer, "JPEG", qtables=whole.quantization, subsampling=sampling)
    off_grid = np.abs(luminance(opened(buffer.getvalue())) - luminance(shifted))
    assert difference.mean() < 0.5 * off_grid.mean()


def test_size_cuts_the_middle_of_anything_else_and_leaves_small_images_out():
    array = pixels(100, 80)
    made = opened(SizeMatched(64)(encoded("PNG", array), "k", False))
    assert made.format == "PNG" and np.array_equal(np.asarray(made), array[8:72, 18:82])
    with pytest.raises(LeftOut, match="left out: smaller than 64 px"):
        SizeMatched(64)(encoded("PNG", pixels(200, 56)), "k", False)


def test_smallest_side_is_of_images_only():
    assert smallest_side([encoded("PNG", pixels(200, 56)), b"text", encoded("PNG", pixels(72, 64))]) == 56
    with pytest.raises(UserError, match="no generated image"):
        smallest_side([b"text"])


@pytest.mark.parametrize(
    "view",
    [
        Degraded((Operation("noise", 3),), seed=1),
        Degraded(chain=3, seed=1),
        JpegFakes(96),
        JpegAll(96),
        HistoryMatched({"80:2": 1}),
        SizeMatched(32),
    ],
)
def test_views_repeat_their_bytes_also_in_another_process(view):
    source = encoded("PNG")
    there = pickle.loads(pickle.dumps(view))
    assert there(source, "k", False) == view(source, "k", False) == view(source, "k", False)
    if not isinstance(view, Degraded | JpegFakes) or view == Degraded(chain=3, seed=1):
        with pytest.raises(Undecodable):
            view(b"text", "k", False)
