"""The same picture twice: found by pixels and by looks, refused across splits."""

import csv
import subprocess
import sys

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.layouts import open_layout
from dataio.sharding.duplicates import FINGERPRINT, NEAR_DISTANCE, exact_pairs, image_fingerprint, near_pairs
from dataio.sharding.job import write_shards
from dataio.sharding.merge import summary
from dataio.shards.manifest import read_manifest

BROKEN = None


def picture(seed, side=96):
    """A smooth random scene, so that its looks are its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def make(tmp_path):
    """Writes {name: (split, image)} as lossless files and shards them."""

    def call(images, allow=False, name="out", **settings):
        (tmp_path / "images").mkdir(exist_ok=True)
        with open(tmp_path / "list.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "generator", "object", "split"])
            for number, (path, (split, image)) in enumerate(images.items()):
                if image is BROKEN:
                    (tmp_path / "images" / path).touch()
                else:
                    image.save(tmp_path / "images" / path)
                rows.writerow([path, "nature" if number % 2 else "gan", "", split])
        layout = open_layout("manifest", tmp_path / "list.csv", root=tmp_path / "images")
        settings = {"samples_per_shard": 3, "quiet": True, "allow_duplicates": allow, **settings}
        return write_shards(layout, tmp_path / name, preset_policy("default", 32), **settings)

    return call


def listed(tmp_path):
    with open(tmp_path / "out" / "duplicates.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_equal_pixels_in_other_containers_are_duplicates_and_near_ones_are_told_apart(make, tmp_path):
    images = {f"{n}.png": ("train" if n < 8 else "test", picture(n)) for n in range(12)}
    images["copy of 3.bmp"] = ("train", picture(3))
    images["copy of 5.jpg"] = ("test", picture(5))  # another codec, other pixels, the same look
    manifest = make(images)
    assert manifest["duplicates"] == {
        "exact": 1,
        "exact_across_splits": 0,
        "near": 1,
        "near_across_splits": 1,
        "near_not_compared": 0,
    }
    near, exact = sorted(listed(tmp_path), key=lambda row: row["kind"], reverse=True)
    assert (exact["kind"], exact["distance"]) == ("exact", "0")
    assert {exact["source_a"], exact["source_b"]} == {"3.png", "copy of 3.bmp"}
    assert near["kind"] == "near" and int(near["distance"]) <= NEAR_DISTANCE
    assert {(near["split_a"], near["source_a"]), (near["split_b"], near["source_b"])} == {
        ("train", "5.png"),
        ("test", "copy of 5.jpg"),
    }
    assert "1 duplicates, 0 of them across splits; 1 near-duplicates, 1 of them" in summary(manifest)


def test_a_duplicate_across_splits_is_an_error_until_it_is_allowed(make, tmp_path):
    images = {f"{n}.png": ("train" if n < 8 else "test", picture(n)) for n in range(12)}
    images["copy of 3.png"] = ("test", picture(3))
    with pytest.raises(UserError) as refused:
        make(images)
    for word in ("1 image", "3.png (train) is copy of 3.png (test)", "duplicates.csv", "allow_duplicates"):
        assert word in str(refused.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert [row["source_a"] for row in listed(tmp_path)] == ["3.png"]
    tars = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}

    allowed = make(images, allow=True)
    assert allowed["duplicates"]["exact_across_splits"] == 1
    # Finished from what was there; the same bytes as if it had been allowed at once.
    assert tars == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}
    assert make(images, allow=True, name="at once") == allowed
    # A finished folder stays finished, with the flag or without.
    assert make(images) == allowed == read_manifest(tmp_path / "out")


def test_the_command_exits_with_2_and_names_the_pair(make, tmp_path, repo_root):
    make({f"{n}.png": ("train", picture(n)) for n in range(4)}, name="other")
    picture(0).save(tmp_path / "images" / "3.png")
    text = (tmp_path / "list.csv").read_text().replace("3.png,nature,,train", "3.png,nature,,val")
    (tmp_path / "list.csv").write_text(text)
    words = [sys.executable, str(repo_root / "launch" / "shard.py"), "--layout", "manifest", "--workers", "1"]
    words += ["--source", str(tmp_path / "list.csv"), "--root", str(tmp_path / "images")]
    words += ["--output", str(tmp_path / "out"), "--codec.size", "32"]
    refused = subprocess.run(words, capture_output=True, text=True)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "0.png (train) is 3.png (val)" in refused.stderr
    allowed = subprocess.run([*words, "--allow-duplicates"], capture_output=True, text=True)
    assert allowed.returncode == 0, allowed.stderr


def test_a_refused_folder_with_an_empty_shard_can_still_be_finished(make, tmp_path):
    images = {f"{n}.png": ("train", picture(n)) for n in range(4)}
    images["copy of 1.png"] = ("test", picture(1))
    images["4.png"] = ("val", BROKEN)
    with pytest.raises(UserError, match="allow-duplicates"):
        make(images, samples_per_shard=1)
    manifest = make(images, allow=True, samples_per_shard=1)
    assert manifest["splits"]["test"]["samples"] == 1 and manifest["splits"]["val"]["shards"] == []


def test_the_look_is_that_of_the_imagehash_library():
    image = picture(1).filter(ImageFilter.GaussianBlur(1))
    _, look, small = image_fingerprint(image)
    assert f"{look:016x}" == str(imagehash.phash(image)) and not small
    assert image_fingerprint(image.resize((31, 200)))[1:] == (0, True)


def test_pixels_that_only_reshape_are_no_duplicates():
    flat = np.zeros((40, 60, 3), np.uint8)
    assert (
        image_fingerprint(Image.fromarray(flat))[0]
        != image_fingerprint(Image.fromarray(flat.reshape(60, 40, 3)))[0]
    )


def rows_of(pixels, looks):
    rows = np.zeros(len(looks), FINGERPRINT)
    rows["key"], rows["look"] = np.arange(len(looks)), looks
    rows["pixels"][:, 0] = pixels
    return rows


def test_pairs_equal_those_of_comparing_all_with_all():
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for target in range(100, 300):  # a few bits off an earlier one
        flips = rng.choice(64, rng.integers(0, 6), replace=False)
        looks[target] = looks[target - 100] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    pixels = rng.integers(0, 250, 300)
    rows = rng.permutation(rows_of(pixels, looks))
    key, order = rows["key"], np.argsort(rows["key"])

    near = near_pairs(rows)[0]
    wanted = {
        (a, b, (int(looks[a]) ^ int(looks[b])).bit_count())
        for a in range(300)
        for b in range(a + 1, 300)
        if (int(looks[a]) ^ int(looks[b])).bit_count() <= NEAR_DISTANCE and pixels[a] != pixels[b]
    }
    found = set(zip(near.first.tolist(), near.second.tolist(), near.distance.tolist(), strict=True))
    assert found == wanted and len(found) > 50

    exact = exact_pairs(rows[order])
    first = {value: int(np.flatnonzero(pixels == value)[0]) for value in set(pixels.tolist())}
    pairs = {(first[value], n) for n, value in enumerate(pixels.tolist()) if first[value] != n}
    assert set(zip(exact.first.tolist(), exact.second.tolist(), strict=True)) == pairs
    assert len(key) == 300


def test_plain_images_are_counted_not_compared():
    near, crowded = near_pairs(rows_of(np.arange(3000), np.zeros(3000, np.uint64)))
    assert len(near.first) == 0 and crowded == 3000
    assert near_pairs(rows_of(np.arange(10), np.zeros(10, np.uint64)))[1] == 0
    assert near_pairs(np.zeros(0, FINGERPRINT))[1] == len(exact_pairs(np.zeros(0, FINGERPRINT)).first) == 0
