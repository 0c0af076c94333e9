"""The codec policy: one container for all, a matched history, and honest rejects."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import CodecPolicy, encode, preset_policy
from dataio.images.opening import Undecodable, open_image, to_rgb
from dataio.images.stored import draw_history, jpeg_history


def picture(width=90, height=60, seed=0):
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width))[:, :, None]
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(encoded):
    with Image.open(io.BytesIO(encoded.data)) as image:
        image.load()
        return image


@pytest.mark.parametrize(
    "source", [saved(picture()), saved(picture(40, 200), "JPEG", quality=80, progressive=True)]
)
def test_default_gives_one_container_to_all(source):
    made = encode(source, preset_policy("default", 64))
    image = decoded(made)
    assert (made.extension, made.width, made.height) == ("jpg", 64, 64)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert "progressive" not in image.info and not image.getexif()
    assert jpeg_history(made.data) == "95:0"


def test_reference_squashes_at_quality_75():
    source = saved(picture(100, 50))
    image = decoded(encode(source, preset_policy("reference", 32)))
    expected = picture(100, 50).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < 12
    assert jpeg_history(encode(source, preset_policy("reference", 32)).data) == "75:2"


def test_native_crop_never_resamples():
    image = picture(101, 75)
    crop = image.crop((25, 12, 75, 62))
    found = encode(saved(image), preset_policy("native-crop", 50)).data
    assert found == saved(crop, "JPEG", quality=95, subsampling=0)
    small = encode(saved(picture(30, 20)), preset_policy("native-crop", 50))
    assert (small.width, small.height) == (30, 20)


def test_keep_keeps_the_bytes():
    for kind, extension in (("PNG", "png"), ("JPEG", "jpg")):
        source = saved(picture(), kind)
        made = encode(source, preset_policy("keep"))
        assert (made.data, made.extension, made.width, made.height) == (source, extension, 90, 60)


def test_policies_survive_json_and_unknown_ones_are_refused():
    policy = CodecPolicy(preset="default", resize="shortest", history={"90:2": 3})
    assert CodecPolicy.from_dict(policy.to_dict()) == policy
    for name, size in (("best", None), ("keep", 64), ("default", 3)):
        with pytest.raises(UserError, match=r"codec\.(preset|size)"):
            preset_policy(name, size)


@pytest.mark.parametrize("quality", [1, 30, 75, 96, 100])
@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_history_reads_quality_and_subsampling_back(quality, sampling):
    source = saved(picture(), "JPEG", quality=quality, subsampling=sampling)
    assert jpeg_history(source) == f"{quality}:{sampling}"
    assert jpeg_history(saved(picture())) is None


def test_history_of_foreign_tables_is_the_nearest_quality():
    with Image.open(io.BytesIO(saved(picture(), "JPEG", quality=90))) as image:
        known: dict[int, list[int]] = vars(image)["quantization"]
    tables = {number: [value + (value > 3) for value in table] for number, table in known.items()}
    found = jpeg_history(saved(picture(), "JPEG", qtables=tables))
    assert found is not None and 85 <= int(found.split(":")[0]) < 90


def test_draws_follow_the_histogram_and_repeat():
    history = {"75:2": 1, "96:0": 3}
    draws = [draw_history(bytes([i % 256, i // 256]), history) for i in range(2000)]
    assert draws == [draw_history(bytes([i % 256, i // 256]), history) for i in range(2000)]
    assert set(draws) == {(75, 2), (96, 0)}
    assert abs(draws.count((96, 0)) / 2000 - 0.75) < 0.04


def test_only_lossless_sources_get_a_history():
    history = {"30:2": 1}
    with_history = CodecPolicy(
        preset="default", resize="shortest", size=60, match_history=True, history=history
    )
    without = CodecPolicy(preset="default", resize="shortest", size=60)
    lossless, lossy = saved(picture()), saved(picture(), "JPEG", quality=97)
    assert encode(lossless, with_history).data != encode(lossless, without).data
    assert encode(lossy, with_history).data == encode(lossy, without).data
    # What quality 30 took away stays away: the blocky version is what is coded.
    once = Image.open(io.BytesIO(saved(picture(), "JPEG", quality=30, subsampling=2)))
    found = np.asarray(decoded(encode(lossless, with_history)), float)
    expected = np.asarray(once, float)[:, 15:75]
    assert np.abs(found - expected).mean() < 2


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(90, 60), "JPEG", quality=95, exif=exif)


def test_exif_orientation_is_applied_once():
    made = encode(oriented(6), preset_policy("native-crop", 256))
    assert (made.width, made.height) == (60, 90)
    assert not decoded(made).getexif()
    assert "orientation 6" in encode(oriented(6), preset_policy("keep")).warning


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_8_bit_rgb(mode):
    if mode == "I;16":
        values = np.asarray(picture().convert("L")).astype(np.uint16) * 257
        source = saved(Image.fromarray(values))
    else:
        source = saved(picture().convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    image = to_rgb(open_image(source))
    assert image.mode == "RGB"
    expected = np.asarray(picture().convert("1" if mode == "1" else "L").convert("L"), float)
    limit = 25 if mode in ("P", "CMYK") else 3
    assert np.abs(np.asarray(image.convert("L"), float) - expected).mean() < limit
    assert encode(source, preset_policy("default", 32)).width == 32


def bomb():
    """A PNG that claims 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"):
        found += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return found


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "zero bytes"),
        (bytes(1000), "nothing but zero bytes"),
        (b"this is text", "not an image"),
        (saved(picture(), "JPEG")[:-700], "truncated"),
        (saved(picture())[:-2000], "truncated|broken|unrecognized"),
        (bomb(), "900 megapixels, more than the limit of 200"),
    ],
)
def test_what_cannot_be_decoded_says_why(source, reason):
    with pytest.raises(Undecodable, match=reason):
        encode(source, preset_policy("default"))


def test_what_only_a_strict_decoder_minds_is_a_warning():
    source = bytearray(saved(picture(200, 200), "JPEG", quality=90))
    source[len(source) // 2 : len(source) // 2 + 40] = bytes(40)
    made = encode(bytes(source), preset_policy("default", 64))
    assert made.warning and made.width == 64
    assert encode(saved(picture(), "JPEG"), preset_policy("default", 64)).warning == ""
