"""One checkpoint and the same images under several codec policies."""

import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import telltale
from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding.job import write_shards
from dataio.sharding.verify import verify_shards
from dataio.shards.manifest import read_manifest
from dataio.shards.shard_set import ShardSet
from engines.checkpoint import files as checkpoints
from engines.checkpoint.contract import codec_differences, policy_from, preprocessing_differences
from engines.config.detector import from_dict
from engines.evaluate.calibrate import calibrate_checkpoint
from engines.evaluate.calibration import load_calibration
from engines.evaluate.compare import compare, compare_evaluations
from engines.evaluate.pairing import Side
from engines.report.report import report_evaluation
from engines.train.build import build_model
from launch.shard import main as shard
from tests.support import write_detector

SIDE = 48
PHOTOGRAPHS = 12
DEFAULT = {**preset_policy("default", 32).to_dict(), "history": {"80:2": 12}}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Twelve photographs (JPEG 80) and as many PNG fakes; shards of three policies; a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("contract")
    random = np.random.default_rng(0)
    with open(folder / "all.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "generator", "object", "split"])
        for number in range(2 * PHOTOGRAPHS):
            real = number < PHOTOGRAPHS
            image = Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            name = f"{number:02d}.{'jpg' if real else 'png'}"
            image.save(folder / name, quality=80)  # of the PNG it is ignored
            rows.writerow([name, "nature" if real else "glide", "cat", ("train", "val", "test")[number % 3]])
    for preset in ("default", "reference"):
        _shard(folder, preset, preset_policy(preset, 32))
    _shard(folder, "keep", preset_policy("keep"))
    manifest = read_manifest(folder / "default")
    write_detector(
        folder / "best.pt",
        generators=manifest["generators"],
        objects=manifest["objects"],
        codec=manifest["codec"],
    )
    return folder


def _shard(folder: Path, name: str, policy, table: str = "all.csv", **options) -> Path:
    layout = ManifestLayout(folder / table, root=folder)
    write_shards(layout, folder / name, policy, quiet=True, allow_duplicates=True, **options)
    return folder / name


def test_the_training_policy_is_accepted_and_recorded(work):
    found = telltale.evaluate(work / "best.pt", work / "default", resamples=5).metrics["data"]
    assert found["codec_equal"] is True and found["codec_differences"] == []
    assert found["codec"] == read_manifest(work / "default")["codec"]
    assert (found["folder"], found["split"], found["images"]) == (str(work / "default"), "test", 8)
    assert found["identity"] == "source" and len(found["manifest_sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "reference",
            ["resize squash, quality 75", "JPEG history: none in the shards, 80:2 (", "in training"],
        ),
        ("keep", ["codec policy: resize keep in the shards, shortest in training"]),
    ],
)
def test_another_policy_is_refused_or_named_and_recorded(work, name, words, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        telltale.evaluate(work / "best.pt", work / name, resamples=5)
    message = str(caught.value)
    assert "\n" not in message and "--codec.from" in message and "--other-codec" in message
    assert all(word in message for word in words), message
    output = tmp_path / "out"
    found = telltale.evaluate(work / "best.pt", work / name, resamples=5, output=output, other_codec=True)
    assert "warning: " in capsys.readouterr().err
    assert json.loads((output / "metrics.json").read_text())["data"] == found.metrics["data"]
    assert found.metrics["data"]["codec_equal"] is False
    assert all(word in "; ".join(found.metrics["data"]["codec_differences"]) for word in words)
    report_evaluation(
        output=str(output), data=str(work / name), split="test", checkpoint=str(work / "best.pt"), pictures=0
    )
    assert "coded differently" in (output / "report.md").read_text()
    with pytest.raises(UserError, match=r"data .*default: the predictions are of .*; give those"):
        report_evaluation(
            output=str(output), data=str(work / "default"), split="test", checkpoint=str(work / "best.pt")
        )


def test_the_same_photographs_compare_under_two_policies(work, tmp_path, capsys):
    for name in ("default", "keep"):
        telltale.evaluate(
            work / "best.pt", work / name, resamples=5, output=tmp_path / name, other_codec=name == "keep"
        )
    found = compare_evaluations(str(tmp_path / "default"), str(tmp_path / "keep"), resamples=5)
    assert (found["images"], found["paired_by"]) == (8, "source")
    assert len(found["notes"]) == 1 and "coded differently" in found["notes"][0]
    assert found["notes"][0] in capsys.readouterr().err


def test_calibrating_is_refused_alike(work, tmp_path, capsys):
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes((work / "best.pt").read_bytes())
    telltale.evaluate(
        checkpoint, work / "keep", split="val", resamples=5, output=tmp_path / "out", other_codec=True
    )
    given: list[dict[str, Any]] = [
        {"data": str(work / "keep")},
        {"predictions": str(tmp_path / "out" / "predictions.parquet")},
    ]
    for arguments in given:
        with pytest.raises(UserError, match=r"resize keep in the shards.*--other-codec"):
            calibrate_checkpoint(checkpoint=str(checkpoint), **arguments)
        done = calibrate_checkpoint(checkpoint=str(checkpoint), other_codec=True, **arguments)
        assert done is not None and "another codec" in done[0].notes[-1]
        assert done[0].data["codec_equal"] is False
        assert load_calibration(checkpoint, checkpoints.load(checkpoint)["model"]) == done[0]
    telltale.load(checkpoint)
    assert "its calibration was fitted on images of another codec" in capsys.readouterr().err


def test_fakes_alone_match_only_with_the_checkpoints_policy(work):
    lines = (work / "all.csv").read_text().splitlines()
    (work / "fakes.csv").write_text("\n".join(line for line in lines if "nature" not in line))
    _shard(work, "alone", preset_policy("default", 32), "fakes.csv", allow_one_class=True)
    alone = read_manifest(work / "alone")
    assert codec_differences(alone["codec"], read_manifest(work / "default")["codec"]) == [
        "JPEG history: none in the shards, 80:2 (4 images) in training"
    ]
    flags = ["--layout", "manifest", "--source", str(work / "fakes.csv"), "--root", str(work)]
    flags += ["--allow-duplicates", "--allow-one-class", "--workers", "1"]
    assert shard([*flags, "--output", str(work / "matched"), "--codec.from", str(work / "best.pt")]) == 0
    matched = read_manifest(work / "matched")
    assert matched["codec"] == read_manifest(work / "default")["codec"]
    found = [image.tobytes() for image in _fakes(work / "matched")]
    assert found == [image.tobytes() for image in _fakes(work / "default")]
    with pytest.raises(UserError, match="was begun with codec"):
        shard([*flags, "--output", str(work / "matched"), "--codec.size", "32"])
    with pytest.raises(UserError, match=r"leave out --codec.size"):
        shard([*flags, "--output", "x", "--codec.from", str(work / "best.pt"), "--codec.size", "32"])


def _fakes(folder: Path) -> list[np.ndarray]:
    shards = telltale.open_shards(folder, "test")
    images = {
        shards.about(n)["source"]: shards.read(n) for n in range(len(shards)) if shards.rows[n]["generator"]
    }
    return [images[name] for name in sorted(images)]


def test_a_policy_without_history_is_followed_without_one(work, tmp_path):
    """Its shards would otherwise take the history of the JPEGs at hand."""
    state = checkpoints.load(work / "best.pt")
    checkpoints.save(tmp_path / "best.pt", {**state, "codec": {**state["codec"], "history": None}})
    _shard(work, "none", policy_from(tmp_path / "best.pt"))
    assert codec_differences(read_manifest(work / "none")["codec"], {**DEFAULT, "history": None}) == []
    assert telltale.evaluate(tmp_path / "best.pt", work / "none", resamples=5).metrics["data"]["codec_equal"]


def test_a_checkpoint_without_a_policy_may_evaluate_anything(work, tmp_path):
    state = checkpoints.load(work / "best.pt")
    del state["codec"]
    checkpoints.save(tmp_path / "best.pt", state)
    found = telltale.evaluate(tmp_path / "best.pt", work / "keep", resamples=5).metrics
    assert found["data"]["codec_equal"] is None
    assert found["reasons"]["data.codec_equal"] == "the checkpoint records no codec policy"
    with pytest.raises(UserError, match="records no codec policy"):
        policy_from(tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preset": "mine", "max_megapixels": 300}, []),
        ({"history": {"80:2": 999}}, []),  # every draw gives the same
        ({"quality": 75}, ["codec policy: quality 75 in the shards, 95 in training"]),
        ({"size": 64}, ["codec policy: size 64 in the shards, 32 in training"]),
        ({"new": 1}, ["codec policy: new 1 in the shards, not recorded in training"]),
        ({"match_history": False}, ["JPEG history: none in the shards, 80:2 (12 images) in training"]),
        (
            {"history": {"80:2": 5, "90:0": 7}},
            ["JPEG history: 90:0 (7 images), 80:2 (5 images) in the shards, 80:2 (12 images) in training"],
        ),
    ],
)
def test_what_changes_pixels_counts(change, words):
    assert codec_differences({**DEFAULT, **change}, DEFAULT) == words


def test_what_an_older_policy_lacks_has_its_default():
    old = {"preset": "keep", "resize": "keep"}
    assert codec_differences(old, replace(preset_policy("keep"), transparency="drop").to_dict()) == []
    assert codec_differences(old, preset_policy("keep").to_dict()) == [
        "codec policy: transparency drop in the shards, white in training"
    ]
    assert codec_differences({**old, "quality": 5}, old) == []
    assert codec_differences(DEFAULT, None) == []


def test_initial_weights_of_other_images_are_named(work):
    config = from_dict({"model": {"backbone": "cifarnet_narrow"}, "data": {"size": 32, "eval_crop": 0.875}})
    config = replace(config, model=replace(config.model, weights=str(work / "best.pt")))
    notes = {}
    for name in ("default", "keep"):
        _, report = build_model(config, ShardSet(work / name, "train"), torch.device("cpu"))
        assert report is not None
        notes[name] = report.notes
    assert notes["default"] == []
    assert "resize keep here, shortest in its training" in notes["keep"][0]
    ours, theirs = {"mean": (0.5,), "size": 32}, {"mean": [0.5], "size": 64}
    assert preprocessing_differences(ours, theirs) == ["data.size: 32 here, 64 in its training"]


def test_images_are_known_by_their_files_in_any_order_and_in_older_folders(work, tmp_path):
    """Shards of another order, and a folder as it was written before identities were kept."""
    _shard(work, "shuffled", policy_from(work / "default"), seed=7, samples_per_shard=3)
    shutil.copytree(work / "default", tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    for split, entry in manifest["splits"].items():
        del entry["identities"]
        (tmp_path / "old" / split / "identity.npy").unlink()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    assert verify_shards(work / "shuffled")[1] == verify_shards(tmp_path / "old")[1] == []
    tables, metrics = {}, {}
    for name, folder in (("one", work / "default"), ("two", work / "shuffled"), ("old", tmp_path / "old")):
        done = telltale.evaluate(work / "best.pt", folder, resamples=5)
        tables[name], metrics[name] = Side(name, done.table), done.metrics
    assert tables["one"].table["identity"].to_pylist() != tables["two"].table["identity"].to_pylist()
    assert metrics["one"]["data"]["identities_sha256"] == metrics["two"]["data"]["identities_sha256"]
    shards = telltale.open_shards(work / "default", "test")
    source = (work / shards.about(0)["source"]).read_bytes()
    assert tables["one"].table["identity"][0].as_py() == hashlib.blake2b(source, digest_size=16).hexdigest()
    found = compare(tables["one"], tables["two"], resamples=20)
    assert (found["images"], found["paired_by"], found["notes"]) == (8, "source", [])
    assert all(
        value is None or value["difference"] == pytest.approx(0, abs=1e-6)
        for value in found["overall"].values()
    )
    assert metrics["old"]["data"]["identity"] == "stored"
    stored = hashlib.blake2b(shards.read(0).tobytes(), digest_size=16).hexdigest()
    assert tables["old"].table["identity"][0].as_py() == stored
    assert compare(tables["old"], tables["one"], resamples=20)["paired_by"] == "key"


def test_damaged_identities_are_found(work, tmp_path):
    shutil.copytree(work / "default", tmp_path / "data")
    file = tmp_path / "data" / "test" / "identity.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "test/identity.npy: its SHA-256 is not the manifest's" in verify_shards(tmp_path / "data")[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"identity\.npy: .* bytes, the manifest says"):
        telltale.open_shards(tmp_path / "data", "test")
