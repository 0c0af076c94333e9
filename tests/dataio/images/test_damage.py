"""Damage is damage, whatever ends the file: the whole picture, or none."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio.images.codec import encode, preset_policy
from dataio.images.opening import Undecodable, complaint_of, open_image, to_rgb
from telltale.images import as_inputs
from tests.dataio.images.pictures import chunk, picture, saved

EOI, IEND = b"\xff\xd9", chunk(b"IEND", b"")
JPEGS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "gray": ("L", {}),
    "gray, progressive": ("L", {"progressive": True}),
    "CMYK": ("CMYK", {}),
    "CMYK, progressive": ("CMYK", {"progressive": True}),
    "restart markers": ("RGB", {"restart_marker_blocks": 2}),
    "4:4:4": ("RGB", {"subsampling": 0, "quality": 95}),
}


@cache
def whole(name):
    """(bytes, pixels) of a file by its name here."""
    if name in JPEGS:
        mode, options = JPEGS[name]
        source = saved(picture(mode=mode), "JPEG", **options)
    elif name == "YCCK":
        source = whole("CMYK")[0]
        at = source.find(b"Adobe") + 11
        source = source[:at] + b"\2" + source[at + 1 :]
    elif name == "MPO":
        source = saved(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    else:
        kind, mode, options = OTHERS[name]
        size = (32, 32) if kind == "ICO" else (48, 32)
        source = saved(picture(*size, mode=mode), kind, **options)
    return source, np.asarray(to_rgb(open_image(source)))


OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PNG": ("PNG", "RGB", {}),
    "PNG, palette": ("PNG", "P", {}),
    "PNG, bilevel": ("PNG", "1", {}),
    "PNG, 16 bits": ("PNG", "I;16", {}),
    "WebP": ("WEBP", "RGB", {}),
    "WebP, lossless": ("WEBP", "RGBA", {"lossless": True}),
    "GIF": ("GIF", "P", {}),
    "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF, deflate": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "TIFF, JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
    "JPEG 2000": ("JPEG2000", "RGB", {}),
    "JPEG 2000, bare": ("JPEG2000", "RGB", {"no_jp2": True, "tile_size": (32, 32)}),
    "AVIF": ("AVIF", "RGB", {}),
    "TGA": ("TGA", "RGB", {}),
    "TGA, RLE": ("TGA", "RGB", {"compression": "tga_rle"}),
    "PPM": ("PPM", "RGB", {}),
    "QOI": ("QOI", "RGB", {}),
    "ICO": ("ICO", "RGB", {}),
    "ICO, bitmap": ("ICO", "RGBA", {"bitmap_format": "bmp"}),
}


def ended(name, source, cut):
    """The file up to a place, as it is and with its format's ending put behind it."""
    start = source[:cut]
    yield start
    if name.startswith("PNG"):
        yield start + IEND
        at = source.find(b"IDAT")
        if cut > at + 4:  # by a program that writes the chunk anew
            yield source[: at - 4] + chunk(b"IDAT", start[at + 4 :]) + IEND
    elif name.startswith("GIF"):
        yield start + b"\0;"
        yield start + b";"
    elif name.startswith("WebP") and cut > 8:
        even = start + bytes(cut % 2)
        yield even[:4] + struct.pack("<I", len(even) - 8) + even[8:]
    elif name.startswith("TGA"):
        yield start + bytes(8) + b"TRUEVISION-XFILE.\0"
    elif name == "QOI":
        yield start + bytes(7) + b"\1"
    else:
        yield start + EOI


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.sampled_from([*JPEGS, "YCCK", "MPO", *OTHERS]), st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_is_refused_or_whole(name, where):
    source, pixels = whole(name)
    for data in ended(name, source, int(where * len(source))):
        if name.startswith(("BMP", "TIFF", "PPM", "AVIF", "ICO")) and not source.startswith(data):
            continue  # such an ending would be two pixels of another color
        try:
            found = np.asarray(to_rgb(open_image(data)))
        except Undecodable as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert found.shape == pixels.shape and (found == pixels).all()


def test_a_damaged_file_that_pillow_has_opened_is_refused_as_well(tmp_path):
    source, pixels = whole("baseline")
    (tmp_path / "x.jpg").write_bytes(source[: len(source) * 4 // 5] + EOI)
    with Image.open(tmp_path / "x.jpg") as image:
        (half,) = as_inputs(image)
        assert half.read is None and "damaged or cut short" in half.error
        assert image.convert("RGB").size == (48, 32)  # the caller's own is as before
    with Image.open(io.BytesIO(source)) as image:
        image.draft("RGB", (24, 16))
        (drafted, again) = as_inputs([image, Image.open(io.BytesIO(source))])
        assert drafted.read is not None and open_image(drafted.read()).size == (24, 16)
        assert again.read is not None and (np.asarray(open_image(again.read())) == pixels).all()


@pytest.mark.parametrize("name", [*JPEGS, "YCCK", "MPO"])
def test_half_of_a_jpeg_is_none(name):
    source, _ = whole(name)
    start = source.find(b"\xff\xda")
    stop = source.find(EOI, start) if name == "MPO" else len(source)
    for share in (0.3, 0.6, 0.95):
        data = source[: start + 14 + int(share * (stop - start - 16))] + EOI
        with pytest.raises(Undecodable, match=r"damaged|truncated|broken data"):
            open_image(data)


def test_a_header_that_says_twice_the_height_is_damage():
    source = bytearray(whole("baseline")[0])
    at = source.find(b"\xff\xc0") + 5
    source[at : at + 2] = struct.pack(">H", 64)
    with pytest.raises(Undecodable, match=r"damaged or cut short: .*premature end"):
        open_image(bytes(source))


@pytest.mark.parametrize("name", ["progressive", "gray, progressive"])
def test_a_progressive_file_without_its_last_scans_is_damaged(name):
    source, _ = whole(name)
    scans = [at for at in range(len(source)) if source[at : at + 2] in (b"\xff\xda", b"\xff\xc4")]
    for at in scans[2:]:
        with pytest.raises(Undecodable, match=r"damaged or cut short|cannot load"):
            open_image(source[:at] + EOI)


def test_a_component_without_a_scan_is_missing():
    """Three gray scans, one for each color, of which the last is left out."""
    gray = [saved(picture(mode="RGB").getchannel(n), "JPEG", subsampling=0) for n in range(3)]
    frame = gray[0].find(b"\xff\xc0")
    scan = gray[0].find(b"\xff\xda")
    head = gray[0][:frame] + b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 32, 48, 3)
    head += b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3)) + gray[0][frame + 13 : scan]
    scans = []
    for number, data in enumerate(gray, 1):
        at = data.find(b"\xff\xda")
        scans.append(b"\xff\xda\0\x08\1" + bytes([number, 0]) + b"\0\x3f\0" + data[at + 10 : -2])
    assert open_image(head + b"".join(scans) + EOI).size == (48, 32)
    with pytest.raises(Undecodable, match="scans are missing: 64 of its 192 coefficients"):
        open_image(head + b"".join(scans[:2]) + EOI)


def test_harmless_oddities_are_a_warning_and_hide_no_damage():
    source, pixels = whole("baseline")
    frame = source.find(b"\xff\xc0")
    odd = {
        "between segments": source[:frame] + b"junk" + source[frame:],
        "before the end": source[:-2] + bytes(12) + source[-2:],
        "a version that is none": source[:11] + b"\3" + source[12:],
    }
    for data in odd.values():
        image = open_image(data)
        assert complaint_of(image) and (np.asarray(image) == pixels).all()
        assert encode(data, preset_policy("default", 32)).warning == complaint_of(image)
    for name in ("between segments", "a version that is none"):
        with pytest.raises(Undecodable, match="premature end"):
            open_image(odd[name][:-200] + EOI)
    assert complaint_of(open_image(source)) == complaint_of(open_image(saved(picture()))) == ""


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_file_of_which_the_rest_was_never_written_is_damaged(share):
    """Zeros are codes of a flat picture, of which more remain than are needed."""
    source = saved(picture(200, 150), "JPEG", quality=90)
    start = source.find(b"\xff\xda") + 14
    stop = start + int(share * (len(source) - start))
    for end in (b"", EOI):
        with pytest.raises(Undecodable, match=r"damaged or cut short|truncated"):
            open_image(source[:stop] + bytes(len(source) - stop - len(end)) + end)


def test_bytes_between_scans_are_a_warning_and_hide_no_damage():
    source, pixels = whole("progressive")
    for at in [at for at in range(len(source)) if source[at : at + 2] == b"\xff\xda"][1:]:
        odd = source[:at] + bytes(12) + source[at:]
        image = open_image(odd)
        assert complaint_of(image) and (np.asarray(image) == pixels).all()
        with pytest.raises(Undecodable, match="damaged or cut short"):
            open_image(odd[:-40] + EOI)


def test_a_lost_restart_marker_is_damage():
    source, _ = whole("restart markers")
    at = source.find(b"\xff\xd2")
    with pytest.raises(Undecodable, match=r"damaged or cut short|broken data"):
        open_image(source[:at] + source[at + 2 :])


def test_a_jpeg_within_a_tiff_is_read_as_strictly():
    source, pixels = whole("TIFF, JPEG")
    with Image.open(io.BytesIO(source)) as image:
        tags = image.tag_v2  # type: ignore[attr-defined]
        at, size = tags[273][0], tags[279][0]
    half = source[: at + size // 2] + EOI + bytes(size - size // 2 - 2) + source[at + size :]
    assert len(half) == len(source) and (pixels == np.asarray(open_image(source))).all()
    with pytest.raises(Undecodable, match="damaged or cut short"):
        open_image(half)


def test_a_png_with_a_wrong_checksum_is_damaged():
    source, _ = whole("PNG")
    stored, height = zlib.decompress(source[source.find(b"IDAT") + 4 : -16]), 32
    rows = zlib.compress(stored[: len(stored) // height * height])
    checksum = struct.pack(">I", zlib.crc32(b"IDAT" + rows) ^ 1)
    data = source[:33] + struct.pack(">I", len(rows)) + b"IDAT" + rows
    assert open_image(data + struct.pack(">I", zlib.crc32(b"IDAT" + rows)) + IEND).size == (48, 32)
    with pytest.raises(Undecodable, match="the checksum of the chunk at byte 33 is wrong"):
        open_image(data + checksum + IEND)
