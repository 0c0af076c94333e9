"""What becomes of values, of sizes and of odd modes; one picture by every way into the program."""

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dataio.core.errors import UserError
from dataio.images.codec import CodecPolicy, encode, open_source, preset_policy
from dataio.images.opening import MEGAPIXELS, Undecodable, open_image, to_rgb, upright
from dataio.perturb.degradations import Operation, degrade
from dataio.vqa.conversations import load_rgb
from engines.audit.features import measure_image
from telltale.images import as_inputs
from tests.dataio.images.pictures import chunk, exif, oriented, picture, png_of, saved

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("RGB", "L", "LA", "RGBA", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "CMYK", "P", "1", "LAB", "YCbCr"),
    "AVIF": ("RGB",),
}
OPTIONS = {"WEBP": {"lossless": True}, "MPO": {"save_all": True}}


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_every_way_shows_the_same_picture(kind, mode, orientation, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = orientation
    source = saved(picture(mode=mode), kind, exif=tags, **OPTIONS.get(kind, {}))
    with Image.open(io.BytesIO(source)) as image:
        turned = ImageOps.exif_transpose(image)
        expected = turned.convert("RGB")
    assert expected.size == ((32, 48) if orientation > 4 else (48, 32))
    shown = saved(expected)

    def same(found):
        return found.size == expected.size and (np.asarray(found) == np.asarray(expected)).all()

    assert same(to_rgb(upright(open_image(source))))
    (tmp_path / "x").write_bytes(source)
    assert same(load_rgb(str(tmp_path / "x")))
    (given,) = as_inputs(Image.open(io.BytesIO(source)))
    assert given.read is not None and same(to_rgb(open_image(given.read())))
    blur = [Operation("blur", 1.0)]
    assert degrade(source, blur, 0, "key") == degrade(shown, blur, 0, "key")
    for preset in (
        "default",
        "native-crop",
        *(["reference"] if mode not in ("P", "1", "CMYK", "LAB", "YCbCr") else []),
    ):
        policy = preset_policy(preset, 24)  # without a history, which only lossless sources get
        assert encode(source, policy).data == encode(shown, policy).data


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "YCbCr", "LAB", "RGBX"])
def test_modes_that_files_rarely_have(mode):
    image = picture(mode={"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode) if mode != "PA" else None
    image = picture(mode="P").convert("PA") if image is None else image
    expected = np.asarray(picture().convert("L") if mode == "La" else picture(), float)
    found = np.asarray(to_rgb(image).convert("L" if mode == "La" else "RGB"), float)
    assert np.abs(found - expected).mean() < (30 if mode == "PA" else 3)


def gray(values, dtype, kind="TIFF", **options):
    return saved(Image.fromarray(np.asarray(values, dtype)), kind, **options)


RAMP = np.add.outer(np.arange(32) * 3, np.arange(48) * 3.0)  # 0 to 234
EIGHT = np.rint(RAMP)
KNOWN = {
    "16 bits": (gray(EIGHT * 257, np.uint16), EIGHT),
    "16 bits, PNG": (gray(EIGHT * 257, np.uint16, "PNG"), EIGHT),
    "16 bits, PGM": (gray(EIGHT * 257, np.uint16, "PPM"), EIGHT),
    "16 bits of a dark PGM": (gray(EIGHT, np.uint16, "PPM"), EIGHT * 0),
    "16 bits, JPEG 2000": (gray(EIGHT * 257, np.uint16, "JPEG2000"), EIGHT),
    "12 bits, PGM": (b"P5 48 32 4095\n" + (EIGHT * 16).astype(">u2").tobytes(), EIGHT),
    "12 bits by the tag": (gray(EIGHT * 16, np.uint16, tiffinfo={281: 4095}), EIGHT),
    "1000 by the tag": (gray(EIGHT * 4, np.uint16, tiffinfo={281: 1000}), np.rint(EIGHT * 1.02)),
    "8 bits in 32": (gray(EIGHT, np.int32), EIGHT),
    "16 bits in 32": (gray(EIGHT * 257, np.int32), EIGHT),
    "floats to 1": (gray(EIGHT / 255, np.float32), EIGHT),
    "floats to 255": (gray(EIGHT, np.float32), EIGHT),
    "floats to 200.5": (gray(EIGHT * 200.5 / 234, np.float32), np.floor(EIGHT * 200.5 / 234)),
    "floats to 65535": (gray(EIGHT * 257, np.float32), EIGHT),
    "black": (gray(EIGHT * 0, np.uint16), EIGHT * 0),
    "black in 32 bits": (gray(EIGHT * 0, np.int32), EIGHT * 0),
}
UNKNOWN = {
    "12 bits": (gray(EIGHT * 16, np.uint16), "from 0 to 3744"),
    "10 bits, PNG": (gray(EIGHT * 4, np.uint16, "PNG"), "from 0 to 936"),
    "8 bits in 16": (gray(EIGHT, np.uint16), "from 0 to 234"),
    "12 bits in 32": (gray(EIGHT * 16, np.int32), "from 0 to 3744"),
    "24 bits in 32": (gray(EIGHT * 65536, np.int32), "from 0 to 1.53354e\\+07"),
    "negative": (gray(EIGHT - 100, np.int32), "from -100 to 134"),
    "floats to 40.5": (gray(EIGHT * 40.5 / 234, np.float32), "from 0 to 40.5"),
    "floats to 300.5": (gray(EIGHT * 300.5 / 234, np.float32), "from 0 to 300.5"),
    "floats from -1": (gray(EIGHT / 234 * 2 - 1, np.float32), "from -1 to 1"),
    "not a number": (gray(np.where(EIGHT, np.nan, 0), np.float32), "nan"),
    "infinite": (gray(np.where(EIGHT, np.inf, 0), np.float32), "inf"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_of_which_white_is_known(name):
    source, expected = KNOWN[name]
    found = np.asarray(to_rgb(open_image(source)), float)
    assert np.abs(found - expected[:, :, None]).max() <= 1
    assert encode(source, preset_policy("reference", 24)).width == 24
    assert np.isfinite(measure_image(source).pixels[0])


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_of_which_white_is_unknown_are_refused(name, tmp_path):
    source, text = UNKNOWN[name]
    for use in (
        lambda: to_rgb(open_image(source)),
        lambda: encode(source, preset_policy("default", 24)),
        lambda: encode(source, preset_policy("reference", 24)),
        lambda: degrade(source, [Operation("blur", 1.0)], 0, "key"),
        lambda: measure_image(source),
    ):
        with pytest.raises(Undecodable, match=f"its values go .*{text}.*convert it to 8 bits"):
            use()
    (tmp_path / "x").write_bytes(source)
    with pytest.raises(UserError, match=r"not a readable image .its values go"):
        load_rgb(str(tmp_path / "x"))
    (given,) = as_inputs(Image.open(io.BytesIO(source)))
    assert "its values go" in given.error


def test_a_png_says_how_many_bits_are_significant():
    plain = gray(EIGHT * 16 + 5, np.uint16, "PNG")
    said = plain[:33] + chunk(b"sBIT", bytes([12])) + plain[33:]
    assert (np.asarray(to_rgb(open_image(said)))[:, :, 0] == EIGHT).all()
    scaled = gray(EIGHT * 257, np.uint16, "PNG")  # as it should be: to the whole range
    scaled = scaled[:33] + chunk(b"sBIT", bytes([8])) + scaled[33:]
    assert (np.asarray(to_rgb(open_image(scaled)))[:, :, 0] == EIGHT).all()


def tiff(data, bits, samples):
    """A TIFF of 48 x 32 pixels, little endian, in one strip."""
    tags = {256: 48, 257: 32, 258: bits, 259: 1, 262: 1 if samples == 1 else 2, 273: 0, 277: samples}
    tags |= {278: 32, 279: len(data)}
    head = 8 + 2 + 12 * len(tags) + 4
    tags[273] = head + 6
    body = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, value in tags.items():
        if tag == 258 and samples == 3:
            body += struct.pack("<HHII", tag, 3, 3, head)
        else:
            body += struct.pack("<HHII", tag, 4 if tag != 258 else 3, 1, value)
    return body + bytes(4) + struct.pack("<3H", bits, bits, bits) + data


def deep(values, kind):
    """A color picture of 16 bits a channel, which Pillow cannot write."""
    rows = np.repeat(np.asarray(values, np.uint16)[:, :, None], 3, axis=2)
    if kind == "TIFF":
        return tiff(rows.astype("<u2").tobytes(), 16, 3)
    lines = rows.astype(">u2").reshape(32, -1).view(np.uint8)
    stored = zlib.compress(np.pad(lines, ((0, 0), (1, 0))).tobytes())
    head = struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_color_of_16_bits_that_has_fewer_is_refused(kind):
    found = np.asarray(to_rgb(open_image(deep(EIGHT * 257, kind))))
    assert (found == EIGHT[:, :, None]).all()
    for factor in (1, 4, 16):
        with pytest.raises(Undecodable, match=r"its values go from 0 to \d+, .*which is white"):
            open_image(deep(EIGHT * factor, kind))


def test_twelve_bits_in_twelve_bits():
    """A TIFF whose samples have 12 bits: Pillow unpacks them to 16."""
    packed = np.unpackbits((EIGHT * 16).astype(">u2").reshape(-1, 1).view(np.uint8), axis=1)[:, 4:]
    source = tiff(np.packbits(packed).tobytes(), 12, 1)
    assert (np.asarray(to_rgb(open_image(source)))[:, :, 0] == EIGHT).all()


def test_the_limit_of_pixels_is_ours_and_pillows_stays(monkeypatch):
    with pytest.raises(Undecodable, match=r"2500 megapixels, more than the limit of 200; .*--max-megapixels"):
        open_image(png_of(50_000, 50_000))
    for theirs in (1000, None, 89_478_485):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            assert open_image(saved(picture(64, 64))).size == (64, 64)
        assert theirs == Image.MAX_IMAGE_PIXELS
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for kind in ("TIFF", "GIF", "WEBP", "JPEG", "BMP"):
                assert open_image(saved(picture(64, 64), kind)).size == (64, 64)
    source = saved(Image.new("1", (1000, 1101)))
    with pytest.raises(Undecodable, match=r"1.1 megapixels, more than the limit of 1"):
        open_image(source, max_megapixels=1)
    with pytest.raises(Undecodable, match="more than the limit of 1"):
        encode(source, preset_policy("default", 24, max_megapixels=1))
    assert encode(source, preset_policy("default", 24, max_megapixels=2)).width == 24
    for theirs in (1000, 89_478_485):
        Image.MAX_IMAGE_PIXELS = theirs
        with pytest.raises(Undecodable):
            open_image(png_of(50_000, 50_000))
        assert theirs == Image.MAX_IMAGE_PIXELS


def test_threads_leave_pillows_limit_as_it_was():
    before, data = Image.MAX_IMAGE_PIXELS, saved(picture())
    threads = [threading.Thread(target=lambda: [open_image(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_phones_108_megapixels_are_decoded_as_small_as_they_are_needed(tmp_path):
    block = exif(oriented(6))
    source = saved(Image.new("L", (12_000, 9_000), 77), "JPEG", quality=30, exif=b"Exif\0\0" + block)
    opened = open_source(source, preset_policy("default", 256))
    assert opened.size == (1500, 1125)  # an eighth
    for preset in ("default", "reference"):
        made = encode(source, preset_policy(preset, 256), opened)
        assert (made.width, made.height) == (256, 256)
    (tmp_path / "x.jpg").write_bytes(source)
    shown = load_rgb(str(tmp_path / "x.jpg"))
    assert shown.size == (1125, 1500) and np.asarray(shown).mean() == pytest.approx(77, abs=2)


def test_policies_of_before_have_the_limit_of_now():
    policy = preset_policy("default")
    assert policy.max_megapixels == MEGAPIXELS and "max_megapixels" not in policy.to_dict()
    assert CodecPolicy.from_dict(policy.to_dict()) == policy
    larger = preset_policy("default", max_megapixels=400)
    assert CodecPolicy.from_dict(larger.to_dict()) == larger != policy
    with pytest.raises(UserError, match=r"codec\.max_megapixels 0: expected at least 1"):
        preset_policy("default", max_megapixels=0)


@pytest.mark.parametrize(
    "error",
    [
        struct.error("argument out of range"),
        MemoryError(),
        RecursionError("deep"),
        KeyError(7),
        AssertionError(),
    ],
)
def test_whatever_a_decoder_raises_is_a_reason_in_one_line(error, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(Undecodable) as caught:
        open_image(saved_before)
    assert str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value) != "argument out of range"


saved_before = saved(picture(), "GIF")
