"""Metadata turn a picture, and nothing in them stops it."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dataio.images.codec import encode, preset_policy
from dataio.images.metadata import image_orientation, without_metadata
from dataio.images.opening import Undecodable, open_image, to_rgb, upright
from tests.dataio.images.pictures import exif, oriented, picture, saved, with_exif

KINDS = ("JPEG", "PNG", "WEBP")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation: Pillow's Transpose
PLAIN = {kind: np.asarray(to_rgb(open_image(saved(picture(), kind)))) for kind in KINDS}


def turned(kind, orientation):
    image = Image.fromarray(PLAIN[kind])
    return np.asarray(image.transpose(Image.Transpose(TURNS[orientation])) if orientation > 1 else image)


def seen(source):
    return np.asarray(to_rgb(upright(open_image(source))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(10))
def test_each_orientation_as_pillow_turns_it(kind, orientation):
    source = with_exif(kind, exif(oriented(orientation)))
    image = open_image(source)
    assert (seen(source) == np.asarray(ImageOps.exif_transpose(image))).all()
    assert image_orientation(image) == (orientation if 2 <= orientation <= 8 else 1)
    assert image_orientation(upright(image)) == 1  # not turned twice


# Windows Explorer's XResolution of -1/0, for one: what fails is writing it anew.
DAMAGED = {
    "a resolution of -1/0": ((0x011A, 10, 1, struct.pack("<I", 38)),),
    "an offset outside the file": ((0x010F, 2, 4000, struct.pack("<I", 2**31)),),
    "a type that is none": ((0x0110, 99, 1, bytes(4)),),
    "a directory that is none": ((0x8769, 4, 1, struct.pack("<I", 2**32 - 1)),),
    "text where a number is expected": ((0x011A, 2, 4, b"abc\0"),),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_tag_changes_nothing(kind, damage):
    for entries in ((oriented(6), *DAMAGED[damage]), (*DAMAGED[damage], oriented(6))):
        source = with_exif(kind, exif(*entries, behind=struct.pack("<ii", -1, 0)))
        assert (seen(source) == turned(kind, 6)).all()
        assert encode(source, preset_policy("native-crop", 64)).width == 32


@st.composite
def blocks(draw):
    """(a block with an orientation, that orientation, its bytes cut or changed at random or b"")."""
    order = draw(st.sampled_from("<>"))
    orientation = draw(st.integers(2, 8))
    word = st.one_of(
        st.sampled_from([0, 8, 26, 2**31, 2**32 - 1]).map(lambda value: struct.pack(f"{order}I", value)),
        st.binary(min_size=4, max_size=4),
    )
    tags = st.sampled_from([0x10E, 0x10F, 0x11A, 0x128, 0x8769, 0x8825, 0xA005, 0x9286])
    entry = st.tuples(tags, st.integers(0, 14), st.sampled_from([0, 1, 2, 300, 2**31, 2**32 - 1]), word)
    entries = draw(st.lists(entry, max_size=5))
    entries.insert(draw(st.integers(0, len(entries))), oriented(orientation, order))
    block = exif(*entries, order=order, behind=draw(st.binary(max_size=60)))
    broken = block[: draw(st.integers(0, len(block)))]
    return block, orientation, broken


@settings(max_examples=60, deadline=None, derandomize=True)
@given(blocks(), st.sampled_from(KINDS))
def test_any_block_of_exif(drawn, kind):
    block, orientation, broken = drawn
    assert (seen(with_exif(kind, block)) == turned(kind, orientation)).all()
    shape = np.asarray(open_image(with_exif(kind, broken))).shape
    assert shape == PLAIN[kind].shape  # turned or not, but a picture


def test_xmp_counts_where_exif_has_no_orientation():
    for kind in ("JPEG", "WEBP", "PNG"):
        source = saved(picture(), kind, xmp=XMP) if kind != "PNG" else png_with_xmp()
        assert (seen(source) == turned(kind, 8)).all()


def png_with_xmp():
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return saved(picture(), pnginfo=info)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_a_tiff_is_turned_once_and_its_damaged_tags_are_passed_over(compression):
    source = saved(picture(), "TIFF", compression=compression, tiffinfo={0x0112: 6, 0x8769: 2**32 - 1})
    image = open_image(source)
    assert image.size == (48, 32) and upright(image).size == (32, 48)
    plain = to_rgb(open_image(saved(picture(), "TIFF", compression=compression)))
    assert (seen(source) == np.asarray(plain.transpose(Image.Transpose.ROTATE_270))).all()


def test_a_parser_of_metadata_that_fails_does_not_cost_the_picture():
    """Pillow reads the resolution while opening, and compressed text of any size."""
    no_numbers = with_exif("JPEG", exif(oriented(6), (0x011A, 2, 2, b"1\0\0\0"), (0x0128, 3, 1, b"\2\0\0\0")))
    assert (seen(no_numbers) == turned("JPEG", 6)).all()
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    assert (seen(saved(picture(), pnginfo=info)) == PLAIN["PNG"]).all()
    source = saved(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    at = source.find(b"MPF\0")
    for place in range(at + 4, at + 40):
        changed = bytearray(source)
        changed[place] = 255
        assert (seen(bytes(changed)) == seen(source)).all()


def test_an_avif_that_is_turned_by_itself_and_has_a_damaged_block():
    source = saved(picture(), "AVIF", exif=exif((0x010E, 2, 2, b"x\0\0\0"), oriented(6)))
    # Text that says to be a number: Pillow writes the block anew, since it takes the orientation out.
    changed = source.replace(struct.pack("<HHI", 0x010E, 2, 2), struct.pack("<HHI", 0x010E, 11, 1))
    assert changed != source
    with pytest.raises(AttributeError):
        Image.open(io.BytesIO(changed))
    assert open_image(changed).size == (48, 32) and upright(open_image(changed)).size == (32, 48)


def test_files_without_metadata_stay_as_they_are():
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        source = saved(picture(), kind)
        assert without_metadata(source) == (source, b"")
    block = exif(oriented(3))
    assert without_metadata(with_exif("PNG", block)) == (saved(picture()), block)
    with pytest.raises(Undecodable):
        open_image(with_exif("JPEG", block)[:200])
