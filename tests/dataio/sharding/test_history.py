"""The JPEG history of a set is found by content, whatever the files are called; notes say where it fails."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from dataio.images.codec import encode, preset_policy
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding import history as history_module
from dataio.sharding.job import write_shards
from dataio.sharding.merge import summary
from dataio.shards.shard_set import ShardSet


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC)


def file_of(seed, kind, **options):
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = {"kind": "JPEG", "quality": 80}
MPO = {"kind": "MPO", "quality": 80, "save_all": True, "append_images": [picture(99)]}
PNG, WEBP = {"kind": "PNG"}, {"kind": "WEBP", "quality": 80}
LOSSLESS_WEBP = {"kind": "WEBP", "lossless": True}
AVIF, TIFF_JPEG = {"kind": "AVIF"}, {"kind": "TIFF", "compression": "jpeg", "quality": 80}


def shard(folder, photographs, fakes, split=lambda number: "train", count=6):
    """Shard a set of `count` photographs and fakes, each given as (name's ending, Pillow's options)."""
    folder.mkdir(exist_ok=True)
    sources = {}
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "generator", "object", "split"])
        for number in range(2 * count):
            ending, options = (photographs, fakes)[number % 2]
            name = f"{number:03d}{ending}"
            sources[name] = file_of(number, **options)
            (folder / name).write_bytes(sources[name])
            writer.writerow([name, ("nature", "glide")[number % 2], "", split(number)])
    manifest = write_shards(
        ManifestLayout(folder / "list.csv", root=folder),
        folder / "out",
        preset_policy("default", 32),
        quiet=True,
    )
    return manifest, sources


@pytest.mark.parametrize(
    ("photographs", "fakes"),
    [
        ((".jpg", JPEG), (".png", PNG)),
        ((".jfif", JPEG), (".png", PNG)),
        ((".jpe", JPEG), (".bmp", {"kind": "BMP"})),
        (("", JPEG), ("", PNG)),
        ((".png", JPEG), (".jpg", PNG)),
        ((".jpg", MPO), (".png", PNG)),
        ((".mpo", MPO), (".webp", LOSSLESS_WEBP)),
        ((".tif", TIFF_JPEG), (".tga", {"kind": "TGA"})),
        ((".JPG", JPEG), (".jp2", {"kind": "JPEG2000"})),
        ((".jpg", JPEG), (".qoi", {"kind": "QOI"})),
    ],
)
def test_fakes_get_the_photographs_history_whatever_the_files_are_called(tmp_path, photographs, fakes):
    manifest, sources = shard(tmp_path, photographs, fakes, count=3)
    sampling = 0 if photographs[1] is TIFF_JPEG else 2
    assert manifest["codec"]["history"] == {f"80:{sampling}": 3} and manifest["notes"] == []
    policy = preset_policy("default", 32)
    shards = ShardSet(tmp_path / "out", "train")
    for row in range(len(shards)):
        source = sources[shards.about(row)["source"]]
        fake = shards.about(row)["generator"] != "nature"
        assert (shards.read(row).tobytes() == encode(source, policy).data) != fake


@pytest.mark.parametrize(
    ("photographs", "fakes", "note"),
    [
        (WEBP, PNG, "photographs with loss, none of them as JPEG"),
        (AVIF, LOSSLESS_WEBP, "photographs with loss, none of them as JPEG"),
        (PNG, PNG, "no image is a JPEG"),
        (PNG, WEBP, "photographs are stored losslessly and fakes with loss"),
        (PNG, JPEG, "photographs are stored losslessly and fakes with loss"),
        (WEBP, JPEG, "100% of the photographs and 0% of the fakes are stored with loss in another format"),
        (JPEG, JPEG, None),
        (WEBP, WEBP, None),
    ],
)
def test_a_note_says_what_the_policy_cannot_hide(tmp_path, photographs, fakes, note):
    manifest, _ = shard(tmp_path, ("", photographs), ("", fakes), count=3)
    assert len(manifest["notes"]) == (note is not None)
    if note:
        assert note in manifest["notes"][0] and f"note: {manifest['notes'][0]}" in summary(manifest)


def test_other_splits_are_looked_at_where_training_images_have_no_jpeg(tmp_path):
    manifest, _ = shard(
        tmp_path, ("", JPEG), ("", PNG), split=lambda number: "test" if number % 2 == 0 else "train", count=3
    )
    assert manifest["codec"]["history"] == {"80:2": 3}


def test_the_search_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "HISTORY_SAMPLE", 2)
    manifest, _ = shard(tmp_path / "enough", ("", JPEG), ("", PNG), count=4)
    assert manifest["codec"]["history"] == {"80:2": 2}
    monkeypatch.setattr(history_module, "_MOST_LOOKED_AT", 0)
    manifest, _ = shard(tmp_path / "none", ("", JPEG), ("", PNG), count=2)
    assert manifest["codec"]["history"] is None and manifest["notes"] == []


@pytest.mark.filterwarnings("error::UserWarning")
def test_odd_metadata_bring_no_warning_of_pillow(tmp_path):
    maker_beyond_the_end = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x64\0\0\0\x32\0\0\0\0\0\0\0"
    odd = {**JPEG, "exif": maker_beyond_the_end}
    manifest, _ = shard(tmp_path, (".jpg", odd), (".png", PNG), count=2)
    assert manifest["codec"]["history"] == {"80:2": 2}
