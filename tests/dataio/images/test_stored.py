"""How files store their pictures, decided by content: a matrix of containers, modes and names."""

import io
import struct
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio.images.codec import encode, preset_policy
from dataio.images.stored import jpeg_history, jpeg_quality, stored_lossless

HISTORY = {"30:2": 1}


def picture(mode="RGB", side=48):
    ramp = np.add.outer(np.arange(side), np.arange(side))[:, :, None] * 2
    noise = np.random.default_rng(0).normal(0, 9, (side, side, 3))
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).convert(mode)


def saved(kind="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def mpo():
    return saved("MPO", save_all=True, append_images=[picture()], quality=80)


def with_icc(kind, **options):
    """WebP then has a VP8X chunk, and its pixels come later."""
    return saved(kind, icc_profile=bytes(700), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", **options)


def animated(**options):
    return saved("WEBP", save_all=True, append_images=[picture("L").convert("RGB")], **options)


def identity_avif():
    """What libavif's lossless mode writes: matrix 0."""
    made = bytearray(saved("AVIF", quality=100, subsampling="4:4:4"))
    at = made.find(b"colrnclx") + 12
    made[at : at + 2] = bytes(2)
    return bytes(made)


LOSSLESS: dict[str, Callable[[], bytes]] = {
    "png": saved,
    "png palette": lambda: saved(mode="P"),
    "apng": lambda: saved(save_all=True, append_images=[picture("L").convert("RGB")]),
    "bmp": lambda: saved("BMP"),
    "gif": lambda: saved("GIF"),
    "ppm": lambda: saved("PPM"),
    "tga": lambda: saved("TGA"),
    "qoi": lambda: saved("QOI"),
    "pcx": lambda: saved("PCX"),
    "sgi": lambda: saved("SGI"),
    "ico": lambda: saved("ICO"),
    "dds": lambda: saved("DDS"),
    **{
        f"tiff {name}": partial(saved, "TIFF", compression=name)
        for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd")
    },
    "tiff bilevel": lambda: saved("TIFF", "1", compression="group4"),
    "webp": lambda: saved("WEBP", lossless=True),
    "webp alpha": lambda: saved("WEBP", "RGBA", lossless=True, exact=True),
    "webp icc": lambda: with_icc("WEBP", lossless=True),
    "webp animated": lambda: animated(lossless=True),
    "jp2": lambda: saved("JPEG2000"),
    "j2k": lambda: saved("JPEG2000", no_jp2=True),
    "jp2 tiles": lambda: saved("JPEG2000", tile_size=(32, 32)),
    "avif": identity_avif,
    "avif at quality 100": lambda: saved("AVIF", quality=100, subsampling="4:4:4"),
    "avif alpha": lambda: saved("AVIF", "RGBA", quality=100, subsampling="4:4:4"),
}
LOSSY: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved("JPEG"),
    "jpeg grey": lambda: saved("JPEG", "L"),
    "jpeg cmyk": lambda: saved("JPEG", "CMYK"),
    "jpeg progressive": lambda: saved("JPEG", progressive=True),
    "mpo": mpo,
    "tiff jpeg": lambda: saved("TIFF", compression="jpeg"),
    "webp": lambda: saved("WEBP", quality=80),
    "webp alpha": lambda: saved("WEBP", "RGBA", quality=80),
    "webp icc": lambda: with_icc("WEBP", quality=80),
    "webp animated": lambda: animated(quality=80),
    "jp2": lambda: saved("JPEG2000", irreversible=True),
    "jp2 cut off": lambda: saved("JPEG2000", quality_mode="dB", quality_layers=[35]),
    "avif": lambda: saved("AVIF", quality=80),
    "avif 4:4:4": lambda: saved("AVIF", quality=95, subsampling="4:4:4"),
    "avif subsampled": lambda: saved("AVIF", quality=100),
    "dds": lambda: saved("DDS", pixel_format="DXT1"),
}


@pytest.mark.parametrize(("cases", "expected"), [(LOSSLESS, True), (LOSSY, False)])
def test_every_container_is_judged_by_its_content(cases, expected):
    found = {name: stored_lossless(make()) for name, make in cases.items()}
    assert found == dict.fromkeys(cases, expected)


@pytest.mark.parametrize("name", ["png", "webp", "tga", "jp2", "qoi", "tiff tiff_lzw"])
def test_lossless_files_get_a_history_and_lossy_ones_do_not(name):
    policy = preset_policy("default", 32)
    matched = type(policy)(**{**policy.to_dict(), "history": HISTORY})
    source = LOSSLESS[name]()
    assert encode(source, matched).data != encode(source, policy).data
    for other in ("webp", "mpo", "tiff jpeg"):
        source = LOSSY[other]()
        assert encode(source, matched).data == encode(source, policy).data


@settings(max_examples=40, deadline=None)
@given(quality=st.integers(1, 100), sampling=st.sampled_from([0, 1, 2]), grey=st.booleans())
def test_a_phones_mpo_and_a_jpeg_in_a_tiff_have_the_quality_of_the_jpeg_inside(quality, sampling, grey):
    mode = "L" if grey else "RGB"
    options = {} if grey else {"subsampling": sampling}
    jpeg = saved("JPEG", mode, quality=quality, **options)
    several = saved("MPO", mode, quality=quality, save_all=True, append_images=[picture("L")], **options)
    assert Image.open(io.BytesIO(several)).format == "MPO"
    assert jpeg_quality(several) == jpeg_quality(jpeg)
    # libtiff's tables are not cut at 255 as a JPEG file's are, which matters for lower qualities.
    quality = max(25, quality)
    tiff = jpeg_quality(saved("TIFF", mode, compression="jpeg", quality=quality))
    assert tiff is not None and (tiff.quality, tiff.exact) == (quality, True)


def test_the_index_of_an_mpo_may_be_damaged():
    made = bytearray(mpo())
    at = made.find(b"MPF\0")
    made[at + 4 : at + 40] = bytes(range(36))
    assert jpeg_history(bytes(made)) == "80:2" and stored_lossless(bytes(made)) is False


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_judged_or_unknown_but_never_a_crash(data):
    cases = {**LOSSLESS, **{f"lossy {name}": make for name, make in LOSSY.items()}}
    made = bytearray(
        cases[data.draw(st.sampled_from(["tiff tiff_lzw", "lossy tiff jpeg", "lossy mpo", "webp icc"]))]()
    )
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=8)):
        made[place % len(made)] = value
    cut = bytes(made[: data.draw(st.integers(0, len(made)))])
    assert stored_lossless(cut) in (True, False, None)
    jpeg_history(cut)


def test_what_is_no_image_is_neither():
    for source in (b"", b"RIFF", struct.pack("<4sI4s", b"RIFF", 4, b"WEBP"), b"text", b"II*\0" + bytes(20)):
        assert stored_lossless(source) is None and jpeg_quality(source) is None
