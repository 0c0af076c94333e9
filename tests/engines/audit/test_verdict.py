"""The audit as a whole, on small sets with leaks that were put there, and on sets without."""

import csv
import io
import itertools
import json
import os
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.layouts import open_layout
from dataio.layouts.synthetic import draw_scene
from dataio.sharding.job import write_shards
from engines.audit.audit import AuditSettings, audit_layout, audit_shards, check_audit_path, write_audit
from engines.audit.gate import AUDIT, audit_line, read_audit
from engines.audit.label_order import CountedLabels, check_mixed
from engines.audit.verdict import format_audit

QUIET: dict[str, Any] = {"sample": 0, "quiet": True}


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scene(number, seed, side=40):
    rng = np.random.default_rng([seed, number])
    pixels = draw_scene(int(rng.integers(10)), (side, side), rng)
    return Image.fromarray(pixels.round().astype(np.uint8))


def make_set(folder, encode, count=200, seed=0, generators=("nature", "gan")):
    """Scenes as a manifest layout; `encode` makes a file of (image, is_fake); names say nothing."""
    folder.mkdir(parents=True)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "generator", "object"])
        for number in range(count):
            generator = generators[number % len(generators)]
            (folder / f"{number:04d}").write_bytes(encode(scene(number, seed), generator != "nature"))
            writer.writerow([f"{number:04d}", generator, ""])
    return open_layout("manifest", folder / "list.csv")


def blurred(image, is_fake):
    return jpeg(image.filter(ImageFilter.GaussianBlur(0.8)) if is_fake else image)


def test_another_format_is_a_fail_that_names_the_format(tmp_path):
    layout = make_set(tmp_path / "set", lambda image, fake: png(image) if fake else jpeg(image))
    found = audit_layout(layout, AuditSettings(**QUIET))
    assert found["verdict"] == "fail"
    assert found["reasons"][0].startswith("container leak: fakes are separable from photographs")
    assert "carried by format (1.000)" in found["reasons"][0] and "dimensions" not in found["reasons"][0]
    assert found["short"][0] == "container 1.00 (format)"
    overall = found["probes"]["container"]["overall"]
    assert (overall["auroc"], overall["low"], overall["real"], overall["fake"]) == (1.0, 1.0, 100, 100)
    assert found["probes"]["container"]["features"][0]["fake"] == "PNG"
    text = format_audit(found)
    assert "verdict: FAIL" in text and "1.000 [1.000, 1.000] *" in text and "photographs" in text


@pytest.mark.slow
def test_a_leak_of_one_generator_alone_is_found(tmp_path):
    def encode(image, fake):
        # Only the third of four generators' images are wider, by as little as a pixel.
        width = image.width + (next(numbers) % 4 == 3)
        return jpeg(image.resize((width, image.height)))

    numbers = itertools.count()
    names = ("nature", "nature", "gan", "vqdm")
    found = audit_layout(make_set(tmp_path / "set", encode, 160, generators=names), AuditSettings(**QUIET))
    assert found["verdict"] == "fail"
    assert found["probes"]["container"]["generators"]["gan"]["auroc"] == 0.5
    assert found["probes"]["container"]["generators"]["vqdm"]["auroc"] == 1.0
    assert "dimensions" in found["reasons"][0]


def test_the_same_container_and_another_blur_is_a_warning(tmp_path):
    found = audit_layout(make_set(tmp_path / "set", blurred), AuditSettings(**QUIET))
    assert found["verdict"] == "warn" and len(found["reasons"]) == 1
    assert found["probes"]["container"]["overall"]["auroc"] == 0.5
    assert found["reasons"][0].startswith("pixel statistics leak: ")
    assert "radial spectrum" in found["reasons"][0] and "resize" in found["reasons"][0]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_identical_distributions_pass(tmp_path, seed):
    layout = make_set(tmp_path / "set", lambda image, fake: jpeg(image), seed=seed)
    found = audit_layout(layout, AuditSettings(**QUIET, seed=seed))
    assert (found["verdict"], found["reasons"]) == ("pass", [])
    one = found["probes"]["pixels"]["overall"]
    assert one["low"] < 0.5 < one["high"] or abs(one["auroc"] - 0.5) < 0.1
    assert "verdict: PASS" in format_audit(found)


def test_too_few_images_never_pass_in_silence(tmp_path):
    found = audit_layout(make_set(tmp_path / "set", blurred, 24), AuditSettings(**QUIET))
    assert found["verdict"] == "warn"
    assert found["probes"]["pixels"]["overall"]["auroc"] is None
    assert "pixel statistics: too few images to say: 12 photographs" in found["reasons"][0]
    assert "too few" in format_audit(found)


def test_one_class_alone_is_said(tmp_path):
    found = audit_layout(
        make_set(tmp_path / "set", blurred, 40, generators=("nature",)), AuditSettings(**QUIET)
    )
    assert found["verdict"] == "warn"
    assert any("too few images to say: no fakes" in reason for reason in found["reasons"])
    assert any("train split has no fakes" in reason for reason in found["reasons"])
    format_audit(found)


@pytest.mark.slow
def test_unreadable_images_are_counted_and_named(tmp_path):
    layout = make_set(tmp_path / "set", blurred, 80)
    (tmp_path / "set" / "0003").write_bytes(b"")
    (tmp_path / "set" / "0004").write_bytes(b"text")
    found = audit_layout(layout, AuditSettings(**QUIET))
    assert found["counts"] == {"images": 80, "looked_at": 78, "unreadable": 2}
    assert found["unreadable"] == [["0003", "zero bytes"], ["0004", "not an image Pillow knows"]]
    assert "0003: zero bytes" in format_audit(found)
    for number in range(80):
        (tmp_path / "set" / f"{number:04d}").write_bytes(b"")
    with pytest.raises(UserError, match="none of 80 images can be read, first: 0000 \\(zero bytes\\)"):
        audit_layout(layout, AuditSettings(**QUIET))


@pytest.mark.slow
def test_the_figures_depend_on_the_seed_and_not_on_the_number_of_workers(tmp_path):
    layout = make_set(tmp_path / "set", blurred, 100)
    alone, many = (
        audit_layout(layout, AuditSettings(sample=70, workers=workers, quiet=True)) for workers in (1, 2)
    )
    assert alone == many and alone["counts"]["looked_at"] == 70
    other = audit_layout(layout, AuditSettings(sample=70, seed=1, quiet=True))
    assert other["probes"] != alone["probes"] and other["counts"] == alone["counts"]


@pytest.mark.slow
def test_groups_reach_the_folds_and_the_intervals(tmp_path):
    make_set(tmp_path / "set", blurred, 80)
    rows = (tmp_path / "set" / "list.csv").read_text().splitlines()
    lines = [f"{rows[0]},group", *(f"{row},{number // 4}" for number, row in enumerate(rows[1:]))]
    (tmp_path / "set" / "list.csv").write_text("\n".join(lines) + "\n")
    found = audit_layout(open_layout("manifest", tmp_path / "set" / "list.csv"), AuditSettings(**QUIET))
    assert found["settings"]["grouped"] and found["probes"]["pixels"]["overall"]["groups"] == 20
    assert "interval over groups" in format_audit(found)


@pytest.mark.slow
def test_duplicates_are_named_by_split_and_label(tmp_path):
    make_set(tmp_path / "set", blurred, 40)
    for copy, original in (("0011", "0010"), ("0030", "0020")):
        (tmp_path / "set" / copy).write_bytes((tmp_path / "set" / original).read_bytes())
    rows = (tmp_path / "set" / "list.csv").read_text().splitlines()
    splits = ["test" if number >= 30 else "train" for number in range(40)]
    lines = [f"{rows[0]},split", *(f"{row},{split}" for row, split in zip(rows[1:], splits, strict=True))]
    (tmp_path / "set" / "list.csv").write_text("\n".join(lines) + "\n")
    found = audit_layout(open_layout("manifest", tmp_path / "set" / "list.csv"), AuditSettings(**QUIET))
    duplicates = found["duplicates"]
    assert (duplicates["exact"], duplicates["exact_across_splits"], duplicates["exact_real_and_fake"]) == (
        2,
        1,
        1,
    )
    assert duplicates["exact_pairs"][0] == [0, ["train", "nature", "0010"], ["train", "gan", "0011"]]
    assert sum(reason.startswith("duplicates: ") for reason in found["reasons"]) == 2
    assert found["balance"]["test"]["images"] == 10


def test_shards_are_audited_beside_their_manifest_and_a_changed_one_is_stale(tiny_shards, tmp_path):
    os.symlink(tiny_shards, tmp_path / "link")
    found = audit_shards(tmp_path / "link", AuditSettings(**QUIET))
    assert found["probes"]["container"]["overall"]["auroc"] == 0.5
    assert found["counts"]["looked_at"] == 160 and found["splits"] == ["train", "val", "test"]
    assert found["order"]["names"]["images"] == 160 and found["order"]["names"]["real_fake_wrong"] == 0
    assert found["duplicates"]["whole"]["exact"] == 0
    assert all(entry["mixed"] for entry in found["order"]["splits"].values())
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((tiny_shards / "manifest.json").read_bytes())
    again = f"telltale audit --shards {folder}"
    assert audit_line(folder, required=False) == f"audit: none of {folder}; run `{again}`"
    write_audit(folder / AUDIT, found)
    assert read_audit(folder / AUDIT) == found
    line = audit_line(folder, required=True)
    assert line.startswith("audit: warn: pixel statistics") and line.endswith(f"({folder / AUDIT})")
    write_audit(folder / AUDIT, found | {"verdict": "fail", "short": ["container 1.00 (format)"]})
    assert "fail: container 1.00 (format)" in audit_line(folder, required=False)
    with pytest.raises(UserError, match=r"is a fail: container 1.00 \(format\)") as refused:
        audit_line(folder, required=True)
    assert "\n" not in str(refused.value)
    write_audit(folder / AUDIT, found | {"splits": ["test"]})
    with pytest.raises(UserError, match="is of test only, not of train"):
        audit_line(folder, required=True)
    write_audit(folder / AUDIT, found)
    with open(folder / "manifest.json", "a") as file:
        file.write("\n")
    for text in (None, "{", "[]", "{}"):
        if text is not None:
            (folder / AUDIT).write_text(text)
        assert f"run `{again}`" in audit_line(folder, required=False)
        with pytest.raises(UserError, match=r"data\.require_audit: "):
            audit_line(folder, required=True)


def test_the_codec_policy_takes_the_container_away_comments_included(tmp_path):
    def encode(image, fake):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **({} if fake else {"comment": b"a camera's"}))
        return buffer.getvalue()

    layout = make_set(tmp_path / "set", encode, 60)
    assert "metadata" in audit_layout(layout, AuditSettings(**QUIET))["short"][0]
    write_shards(layout, tmp_path / "shards", preset_policy("default", 32), quiet=True)
    found = audit_shards(tmp_path / "shards", AuditSettings(**QUIET))
    assert all(one.get("constant") for one in found["probes"]["container"]["families"].values())


def test_labels_that_are_not_those_of_the_names_are_said(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with open(folder / "list.csv", "w") as file:
        file.write("path,generator,object\n")
        for number in range(40):
            # As a program has it that took ImageFolder's order, ai before nature, for its labels.
            name = f"1_adm_{number}.PNG" if number % 2 else f"n01440764_{number}.JPEG"
            (folder / name).write_bytes(jpeg(scene(number, 0)))
            file.write(f"{name},{'nature' if number % 2 else 'adm'},\n")
    found = audit_layout(open_layout("manifest", folder / "list.csv"), AuditSettings(**QUIET))
    assert found["order"]["names"]["real_fake_wrong"] == 40
    assert any(reason.startswith("labels: of 40 images, 40 are real where") for reason in found["reasons"])


def test_order_is_told_from_mixing():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [500, 250, 250]))
    assert check_mixed(labels)["mixed"]
    assert not check_mixed(np.sort(labels))["mixed"]
    blocks = np.tile(np.repeat([0, 1], 20), 25)
    assert (
        check_mixed(blocks)["position_auroc"] == pytest.approx(0.5, abs=0.05)
        and not check_mixed(blocks)["mixed"]
    )
    assert check_mixed(np.zeros(50, np.int64)) == {
        "images": 50,
        "equal_neighbours": 1.0,
        "expected": 1.0,
        "position_auroc": None,
        "mixed": True,
    }
    assert check_mixed(np.array([1]))["mixed"]


def test_counting_classes_shifts_every_label_behind_a_gap():
    counting = CountedLabels("genimage")
    for label in (0, 1, 3, 3, 4):
        counting.add(f"ADM/train/nature/n{label:08d}_1.JPEG", "nature", label)
    counting.add("ADM/train/ai/7_adm_1.PNG", "adm", 7)  # fakes' names hold the class itself
    found = counting.result()
    assert found is not None
    assert (found["images"], found["shifted_images"]) == (5, 3) and found["first"] == ["ADM/train/nature"]
    names = [f"{n:04d} ({k}).jpg" if k > 1 else f"{n:04d}.jpg" for n in range(3) for k in range(1, 11)]
    for lost in (None, "0001 (10).jpg"):
        counting = CountedLabels("cifake")
        for name in names:
            if name != lost:
                suffix = int(name[6:-5]) if "(" in name else 1
                counting.add(f"train/REAL/{name}", "nature", suffix - 1)
        found = counting.result()
        assert found is not None and found["shifted_images"] == (0 if lost is None else 19)
    assert CountedLabels("manifest").result() is None


def test_mistakes_are_one_line(tmp_path, tiny_shards):
    with pytest.raises(UserError, match="split trian: expected some of train, val, test"):
        AuditSettings(splits=["trian"])
    with pytest.raises(UserError, match="sample -1"):
        AuditSettings(sample=-1)
    with pytest.raises(UserError, match="is a folder, expected the name of a JSON file"):
        check_audit_path(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "audit.json", "/proc/audit.json"):
        with pytest.raises(UserError, match=f"output {path}: cannot be written"):
            check_audit_path(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images of the genimage layout \\(empty\\)"):
        audit_layout(open_layout("genimage", tmp_path / "empty"), AuditSettings(**QUIET))
    with pytest.raises(UserError, match="no such audit"):
        read_audit(tmp_path / "audit.json")
    check_audit_path(tmp_path / "new" / "audit.json")
    assert not (tmp_path / "new").exists()
    write_audit(tmp_path / "new" / "audit.json", {"verdict": "pass"})
    assert json.loads((tmp_path / "new" / "audit.json").read_text()) == {"verdict": "pass"}
