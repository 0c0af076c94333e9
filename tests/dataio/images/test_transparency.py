"""What one can see through is shown on white, in every mode, container and path; old policies drop it."""

import io

import numpy as np
import pytest
from PIL import Image

from dataio.images.codec import CodecPolicy, encode, preset_policy
from dataio.images.opening import open_image, to_rgb
from dataio.images.transparency import alpha_of
from dataio.perturb.degradations import Operation, degrade
from dataio.sharding.duplicates import image_fingerprint
from dataio.vqa.conversations import load_rgb
from telltale.images import as_inputs

SIDE = 32


def cut_out(hidden=0, opacity=255):
    """A picture of which the left half is hidden, in one colour; the rest has one opacity."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
    pixels[..., 3] = opacity
    pixels[:, : SIDE // 2] = (hidden, hidden, hidden, 0)
    return Image.fromarray(pixels)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(image):
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def palette_with_alpha():
    image = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 9).convert("P")
    image.putpalette([value for number in range(9) for value in (number * 25, 255 - number * 20, 90)])
    return saved(image, transparency=bytes([0, 40, 80, 120, 160, 200, 240, 255, 255]))


RGBA = cut_out(opacity=180)
GREY = RGBA.convert("RGB").convert("L")
FILES = {
    "RGBA": saved(RGBA),
    "LA": saved(RGBA.convert("LA")),
    "P, one entry": saved(RGBA.convert("RGB").quantize(16), transparency=3),
    "P, opacities": palette_with_alpha(),
    "RGB, one colour": saved(RGBA.convert("RGB"), transparency=(0, 0, 0)),
    "L, one level": saved(GREY, transparency=0),
    "1": saved(GREY.convert("1"), transparency=0),
    "GIF": saved(RGBA, "GIF"),
    "WebP": saved(RGBA, "WEBP", lossless=True, exact=True),
    "lossy WebP": saved(RGBA, "WEBP", quality=90),
    "TIFF": saved(RGBA, "TIFF"),
    "TIFF LA": saved(RGBA.convert("LA"), "TIFF"),
    "AVIF": saved(RGBA, "AVIF"),
    "JPEG 2000": saved(RGBA, "JPEG2000"),
    "TGA": saved(RGBA, "TGA"),
    "ICO": saved(RGBA, "ICO", sizes=[(SIDE, SIDE)]),
    "QOI": saved(RGBA, "QOI"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_one_can_see_through_is_shown_on_white_as_pillow_composites_it(name):
    image = open_image(FILES[name])
    assert alpha_of(image) is not None
    assert np.array_equal(np.asarray(to_rgb(image)), on_white(open_image(FILES[name])))
    # "drop" is what earlier versions did.
    dropped = image.convert("RGBA") if image.mode == "P" else image
    assert np.array_equal(np.asarray(to_rgb(image, "drop")), np.asarray(dropped.convert("RGB")))


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_modes_that_only_a_program_makes(mode):
    image = RGBA.convert("LA").convert("La") if mode == "La" else RGBA
    image = image.convert("RGBa") if mode == "RGBa" else image
    if mode == "PA":
        image = GREY.convert("P").convert("PA")
        image.putalpha(RGBA.getchannel("A"))
    assert image.mode == mode
    plain = image.convert({"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}[mode])
    assert np.array_equal(np.asarray(to_rgb(image)), on_white(plain))
    (given,) = as_inputs(image)
    assert given.read is not None
    assert np.array_equal(np.asarray(to_rgb(open_image(given.read()))), on_white(plain))


def test_16_bits_have_a_hidden_value_too():
    values = np.full((SIDE, SIDE), 40_000, np.uint16)
    values[:5] = 777
    grey = np.asarray(to_rgb(open_image(saved(Image.fromarray(values), transparency=777))))
    assert (grey[:5] == 255).all() and (grey[5:] == 40_000 >> 8).all()
    # In RGB Pillow cuts the pixels to 8 bits, and the hidden colour not.
    image = Image.fromarray(np.tile(np.array([200, 100, 50], np.uint8), (4, 4, 1)))
    image.info["transparency"] = (200 << 8 | 7, 100 << 8, 50 << 8)
    assert (np.asarray(to_rgb(image)) == 255).all()
    image.info["transparency"] = "no colour"
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_changes_nothing(kind, mode):
    opaque = cut_out().convert("RGB").convert("L" if mode == "LA" else "RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    plain, with_alpha = saved(opaque, kind, **options), saved(opaque.convert(mode), kind, **options)
    image = open_image(with_alpha)
    assert alpha_of(image) is None
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(to_rgb(open_image(plain))))
    assert image_fingerprint(to_rgb(image)) == image_fingerprint(to_rgb(image, "drop"))
    policies = [preset_policy("default", 16), old_policy("default", 16)]
    assert encode(with_alpha, policies[0]) == encode(with_alpha, policies[1])


def old_policy(preset, size=None):
    """As an earlier version stored it."""
    values = preset_policy(preset, size).to_dict()
    del values["transparency"]
    return CodecPolicy.from_dict(values)


@pytest.mark.parametrize("preset", ["default", "native-crop", "keep"])
def test_hidden_colors_do_not_count(preset):
    policy = preset_policy(preset)
    made = {encode(saved(cut_out(hidden)), policy).data for hidden in (0, 90)}
    assert len(made) == 1
    # A lossless WebP may clear what is hidden; the same picture it is.
    webp = encode(saved(cut_out(90), "WEBP", lossless=True), policy)
    shown = np.asarray(to_rgb(open_image(webp.data)))
    assert np.array_equal(shown, np.asarray(to_rgb(open_image(made.pop()))))


@pytest.mark.parametrize("preset", ["default", "native-crop", "keep", "reference"])
def test_a_policy_of_an_earlier_version_drops_transparency_and_warns(preset):
    policy = old_policy(preset)
    assert policy.transparency == "drop"
    assert (policy == preset_policy(preset)) == (preset == "reference")
    made = [encode(saved(cut_out(hidden)), policy) for hidden in (0, 255)]
    # The reference resizes before it drops, which takes the hidden colors away.
    assert preset == "reference" or made[0].data != made[1].data
    assert all("transparency is dropped" in one.warning for one in made)
    assert (
        preset in ("keep", "reference")
        or made[0].data == encode(saved(cut_out(0).convert("RGB")), policy).data
    )
    assert encode(saved(cut_out().convert("RGB")), policy).warning == ""


def test_every_path_shows_the_same_picture(tmp_path):
    black, white = (saved(cut_out(hidden)) for hidden in (0, 255))
    blurred = [degrade(source, [Operation("blur", 1.0)], 0, "k") for source in (black, white)]
    assert blurred[0] == blurred[1]
    (tmp_path / "a.png").write_bytes(black)
    assert np.array_equal(np.asarray(load_rgb(str(tmp_path / "a.png"))), on_white(cut_out()))
    for image in (cut_out(), cut_out().convert("LA")):
        (given,) = as_inputs(image)
        assert given.read is not None
        assert np.array_equal(np.asarray(to_rgb(open_image(given.read()))), on_white(image))
