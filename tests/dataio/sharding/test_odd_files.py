"""One odd file costs that file, is named with its reason, and nothing else."""

import csv
import struct

import pytest

from dataio.images import codec
from dataio.images.codec import preset_policy
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding.job import write_shards
from dataio.sharding.merge import summary
from dataio.sharding.verify import verify_shards
from dataio.shards.manifest import read_manifest
from tests.dataio.images.pictures import exif, oriented, picture, saved, with_exif

JPEG = saved(picture(160, 120), "JPEG", quality=90)
RESOLUTION = (0x011A, 10, 1, struct.pack("<I", 38))
FILES = {
    "turned.jpg": with_exif("JPEG", exif(oriented(6), RESOLUTION, behind=struct.pack("<ii", -1, 0))),
    "padded.jpg": JPEG[:-2] + bytes(16) + JPEG[-2:],
    "half.jpg": JPEG[: len(JPEG) * 2 // 3] + b"\xff\xd9",
    "twelve_bits.tif": saved(picture(mode="I;16").point(lambda value: value / 16), "TIFF"),
    **{f"{number}.jpg": saved(picture(seed=number), "JPEG") for number in range(3)},
    **{f"{number}.png": saved(picture(seed=number + 9)) for number in range(3)},
}


@pytest.fixture
def layout(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "generator", "object"])
        rows.writerows([name, "glide" if name.endswith(".png") else "nature", "bird"] for name in FILES)
    return ManifestLayout(folder / "labels.csv", root=folder)


def test_damaged_files_are_rejected_and_odd_ones_are_kept(layout, tmp_path, recwarn):
    write_shards(layout, tmp_path / "out", preset_policy("default", 32), quiet=True)
    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert sorted(rejected) == ["half.jpg", "twelve_bits.tif"]
    assert "damaged or cut short" in rejected["half.jpg"]
    assert "which is white; convert it to 8 bits" in rejected["twelve_bits.tif"]
    manifest = read_manifest(tmp_path / "out")
    assert [entry["path"] for entry in manifest["warnings"]] == ["padded.jpg"]
    assert "  kept padded.jpg: Corrupt JPEG data: " in summary(manifest)
    assert verify_shards(tmp_path / "out") == (8, [])
    assert not [warning for warning in recwarn if "EXIF" in str(warning.message)]


def test_whatever_is_raised_for_one_file_rejects_it(layout, tmp_path, monkeypatch):
    def fails(image, policy):
        if image.size == (32, 48):  # the turned one
            raise struct.error("argument out of range")
        return shape(image, policy)

    shape = codec._shape
    monkeypatch.setattr(codec, "_shape", fails)
    write_shards(layout, tmp_path / "out", preset_policy("default", 32), quiet=True)
    reasons = {entry["path"]: entry["reason"] for entry in read_manifest(tmp_path / "out")["rejected"]}
    assert reasons["turned.jpg"] == "damaged: its decoder failed (struct.error: argument out of range)"


def test_too_many_pixels_are_a_reason_with_the_flag(layout, tmp_path):
    big = tmp_path / "images" / "0.jpg"
    big.write_bytes(saved(picture(1200, 900), "JPEG"))
    write_shards(layout, tmp_path / "a", preset_policy("default", 32, max_megapixels=1), quiet=True)
    reasons = {entry["path"]: entry["reason"] for entry in read_manifest(tmp_path / "a")["rejected"]}
    assert "1.1 megapixels, more than the limit of 1" in reasons["0.jpg"]
    assert "--codec.max_megapixels" in reasons["0.jpg"]
    assert read_manifest(tmp_path / "a")["codec"]["max_megapixels"] == 1
