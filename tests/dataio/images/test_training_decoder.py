"""What is kept under codec preset keep is what training sees: the upright picture that Pillow shows."""

import io
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dataio.images.codec import CodecPolicy, encode, preset_policy
from dataio.images.opening import Undecodable, open_image, to_rgb, upright
from dataio.images.training_decoder import training_fault, training_pixels

KEEP = preset_policy("keep")


def picture(mode="RGB", width=48, height=32):
    ramp = np.add.outer(np.arange(height), np.arange(width))[:, :, None] * 2
    noise = np.random.default_rng(0).normal(0, 9, (height, width, 3))
    image = Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))
    if mode == "LAB":
        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        made = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
        assert made is not None
        return made
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        image.putalpha(
            Image.fromarray(np.where(np.arange(width) < 20, 30, 255).astype(np.uint8)[None].repeat(height, 0))
        )
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    return image.convert(mode)


def saved(kind="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(kind, exif=exif, **options)


def with_text(kind, mode="RGB", **options):
    """As the web user interfaces of generators write their prompts."""
    exif = Image.Exif()
    exif[0x010E] = "a prompt"
    return saved(kind, mode, exif=exif.tobytes(), **options)


def without_adobe_marker():
    jpeg = saved("JPEG", "CMYK")
    at = jpeg.find(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def check(source):
    """Encode under keep; what is kept must be what training sees. Returns what `encode` does."""
    made = encode(source, KEEP)
    shown, expected = training_pixels(made.data), np.asarray(to_rgb(upright(open_image(source))))
    assert shown.shape == expected.shape == (made.height, made.width, 3)
    assert np.abs(shown.astype(int) - expected).mean() <= 2
    assert (made.data == source) == ("re-coded as PNG" not in made.warning)
    return made


KEPT: dict[str, Callable[[], bytes]] = {
    **{f"{kind} {mode}": partial(saved, kind, mode) for kind in ("PNG", "JPEG") for mode in ("L", "RGB")},
    **{f"PNG {mode}": partial(saved, "PNG", mode) for mode in ("1", "P", "I;16")},
    "progressive": partial(saved, "JPEG", progressive=True),
    "CMYK with its marker": partial(saved, "JPEG", "CMYK"),
    "WebP": partial(saved, "WEBP"),
    "lossless WebP": partial(saved, "WEBP", lossless=True),
    "BMP": partial(saved, "BMP"),
    "TIFF": partial(saved, "TIFF"),
    "TIFF LZW": partial(saved, "TIFF", compression="tiff_lzw"),
    "orientation 1": partial(turned, "JPEG", 1),
    "MPO": lambda: saved("MPO", save_all=True, append_images=[picture()]),
}
RECODED: dict[str, Callable[[], bytes]] = {
    **{
        f"{kind} turned {number}": partial(turned, kind, number)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
        for number in range(2, 9)
    },
    "TIFF LZW turned": partial(turned, "TIFF", 6, compression="tiff_lzw"),
    "CMYK without its marker": without_adobe_marker,
    "WebP with alpha and text": partial(with_text, "WEBP", "RGBA", lossless=True),
    "bilevel TIFF": partial(saved, "TIFF", "1"),
    "int32 TIFF": partial(saved, "TIFF", "I"),
    "LZMA TIFF": partial(saved, "TIFF", compression="lzma"),
    "LAB TIFF": partial(saved, "TIFF", "LAB"),
    **{f"{kind} LA": partial(saved, kind, "LA") for kind in ("PNG", "TIFF", "WEBP")},
    **{f"{kind} RGBA": partial(saved, kind, "RGBA") for kind in ("PNG", "TIFF", "WEBP")},
    **{kind: partial(saved, kind) for kind in ("GIF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "ICO")},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_training_shows_as_pillow_does_keeps_its_bytes(name):
    source = KEPT[name]()
    made = check(source)
    assert made.data == source and made.warning == ""


@pytest.mark.parametrize("name", RECODED)
def test_what_it_shows_otherwise_becomes_a_png_of_the_upright_picture(name):
    source = RECODED[name]()
    made = check(source)
    assert made.extension == "png" and "re-coded as PNG: " in made.warning
    with Image.open(io.BytesIO(made.data)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB") and not image.info
        assert np.array_equal(np.asarray(image), np.asarray(to_rgb(upright(open_image(source)))))
    assert encode(made.data, KEEP).data == made.data


EITHER: dict[str, Callable[[], bytes]] = {
    "lossless WebP with text": partial(with_text, "WEBP", lossless=True),
    "WebP with text": partial(with_text, "WEBP"),
    "APNG": lambda: saved(save_all=True, default_image=True, append_images=[picture("L").convert("RGB")]),
    "animated WebP": lambda: saved("WEBP", save_all=True, append_images=[picture("L").convert("RGB")]),
    "pages": lambda: saved("TIFF", save_all=True, append_images=[picture("L")]),
    "float TIFF": partial(saved, "TIFF", "F"),
    "CMYK TIFF": partial(saved, "TIFF", "CMYK"),
    "JPEG in TIFF": partial(saved, "TIFF", "YCbCr", compression="jpeg"),
}


@pytest.mark.parametrize("name", EITHER)
def test_what_versions_of_dali_may_show_either_way_is_right_in_the_end(name):
    check(EITHER[name]())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("JPEG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("TIFF", "L"), ("PNG", "P"), ("BMP", "RGB")]),
    st.integers(1, 8), st.integers(1, 40), st.integers(1, 40),
)  # fmt: skip
def test_any_format_turn_and_size(container, orientation, width, height):
    kind, mode = container
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(mode, width, height).save(buffer, kind, **({} if kind == "BMP" else {"exif": exif}))
    check(buffer.getvalue())


def test_a_dark_picture_is_turned_too():
    """Its mirror image differs by less than decoders do."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[0, 0] = 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 2
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    assert training_pixels(encode(buffer.getvalue(), KEEP).data)[0, -1].tolist() == [255] * 3


def test_what_cannot_be_decoded_is_said_and_the_next_file_is_decoded():
    good = saved()
    broken = bytearray(saved("TIFF", compression="lzma"))
    for source in (b"text", bytes(broken), b"\xff\xd8\xff" + bytes(100)):
        with pytest.raises(Undecodable):
            training_pixels(source)
        assert training_pixels(good).shape == (32, 48, 3)
    with pytest.raises(Undecodable):
        encode(b"text", KEEP)


def test_threads_share_the_decoder():
    sources = [saved("JPEG", quality=quality) for quality in range(60, 76)]
    found = {}

    def decode(number):
        found[number] = training_pixels(sources[number])

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, source in enumerate(sources):
        assert np.array_equal(found[number], np.asarray(Image.open(io.BytesIO(source))))


def test_a_policy_of_an_earlier_version_keeps_transparent_files():
    values = KEEP.to_dict()
    del values["transparency"]
    source = saved("PNG", "RGBA")
    assert encode(source, CodecPolicy.from_dict(values)).data == source
    assert training_fault(source, open_image(source), "drop") == ""
    assert "transparency" in training_fault(source, open_image(source), "white")
