"""Shards: the same bytes however they were written, readable by everybody else."""

import csv
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.layouts import open_layout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.job import write_shards
from dataio.sharding.merge import summary
from dataio.sharding.verify import verify_shards
from dataio.shards.shard_set import ShardSet
from tests.support import alive, descendants, environment, wait_until


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """120 images in GenImage's layout, three of them broken."""
    folder = tmp_path_factory.mktemp("source") / "images"
    write_synthetic(folder, images=120, size=32, seed=1)
    train = sorted(folder.glob("*/*/train/*/*"))
    train[3].write_bytes(b"")
    train[40].write_bytes(train[40].read_bytes()[:-200])
    train[70].write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "out"
    write(source, output)
    return output


def write(source, output, **changes):
    settings = {"samples_per_shard": 15, "quiet": True, **changes}
    return write_shards(open_layout("synthetic", source), output, preset_policy("default", 32), **settings)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(source, output, repo_root, *words):
    base = [
        sys.executable,
        str(repo_root / "launch" / "shard.py"),
        "--layout",
        "genimage",
        "--source",
        str(source),
    ]
    return [*base, "--output", str(output), "--samples-per-shard", "15", "--codec.size", "32", *words]


def test_two_workers_write_the_bytes_of_one(source, repo_root, tmp_path):
    for workers in ("1", "2"):
        done = subprocess.run(
            command(source, tmp_path / workers, repo_root, "--workers", workers),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert not (tmp_path / "1" / ".work").exists()
    assert "3 rejected" in done.stdout


def got_further(process: subprocess.Popen[bytes], folder: Path, shards: int) -> bool:
    return process.poll() is not None or len(list(folder.glob(".work/*-*.json"))) >= shards


def none_alive(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(source, repo_root, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    slow = command(source, killed, repo_root, "--workers", "2")
    subprocess.run(command(source, whole, repo_root, "--workers", "1"), check=True, capture_output=True)
    for seen in range(1, 4):
        process = subprocess.Popen(
            slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        # Each time a little further: as soon as there is one more committed shard.
        committed = functools.partial(got_further, process, killed, seen)
        wait_until(committed, 60, "a shard")
        children = descendants(process.pid)
        process.kill()
        process.wait()
        gone = functools.partial(none_alive, children)
        wait_until(gone, 10, "the workers' end")
    done = subprocess.run(slow, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(killed) == contents(whole)


def test_running_again_on_a_finished_folder_changes_nothing_and_other_settings_are_refused(source, shards):
    before = contents(shards)
    write(source, shards)
    with pytest.raises(UserError, match="was begun with samples_per_shard 15, not 20"):
        write(source, shards, samples_per_shard=20)
    with pytest.raises(UserError, match="seed 0, not 1"):
        write(source, shards, seed=1)
    assert contents(shards) == before


def test_rejected_files_are_listed_and_shift_nothing(source, shards, tmp_path):
    with open(shards / "rejected.csv", newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert sorted(rejected.values()) == sorted(
        ["zero bytes", "not an image Pillow knows", rejected_truncated(rejected)]
    )
    manifest = json.loads((shards / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["rejected"]} == set(rejected)
    counts = [shard["samples"] for split in manifest["splits"].values() for shard in split["shards"]]
    assert sum(counts) == 117
    repaired = tmp_path / "repaired"
    shutil.copytree(source, repaired)
    good = next(path for path in sorted(repaired.glob("*/*/train/ai/*")) if path.stat().st_size > 100)
    for path in rejected:
        (repaired / path).write_bytes(good.read_bytes())
    write(repaired, tmp_path / "out")
    whole, short = (keys(folder) for folder in (tmp_path / "out", shards))
    assert len(whole) == 120 and set(short.items()) <= set(whole.items())


def rejected_truncated(rejected):
    return next(reason for reason in rejected.values() if "truncated" in reason or "broken" in reason)


def keys(folder: Path) -> dict[str, str]:
    """{key: source} of every sample."""
    found = {}
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    text = tar.extractfile(member)
                    assert text is not None
                    found[member.name] = json.loads(text.read())["source"]
    return found


def test_members_are_plain_and_timeless(shards):
    for path in shards.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                    0,
                    0,
                    0,
                    "",
                    0o644,
                )


def test_webdataset_reads_them(shards):
    tars = sorted(map(str, (shards / "train").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb"))
    ours = ShardSet(shards, "train")
    assert len(samples) == len(ours)
    for row, sample in zip(ours.rows, samples, strict=True):
        assert sample["__key__"].endswith(f"{int(row['key']):09d}")
        assert ours.labels.generators[int(row["generator"])] == sample["json"]["generator"]
        assert sample["json"]["object"] == row["object"]
        assert sample["jpg"].shape == (32, 32, 3)


def test_dali_reads_them_with_our_index(shards):
    tars = sorted(map(str, (shards / "train").glob("*.tar")))

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipeline():
        images, records = fn.readers.webdataset(  # type: ignore[misc]
            paths=tars,
            index_paths=[t.replace(".tar", ".idx") for t in tars],
            ext=["jpg", "json"],
            name="reader",
        )
        return images, records

    built = pipeline()
    built.build()
    ours = ShardSet(shards, "train")
    assert built.epoch_size("reader") == len(ours)
    images, records = built.run()
    for number in range(5):
        assert np.array_equal(np.asarray(images.at(number)), ours.read(number))
        assert json.loads(bytes(np.asarray(records.at(number))))["generator"] in ours.labels.generators


def test_our_index_is_the_one_dalis_own_tool_writes(shards, tmp_path):
    tar = sorted((shards / "train").glob("*.tar"))[0]
    subprocess.run(
        [sys.executable, "-m", "wds2idx", str(tar), str(tmp_path / "its.idx")],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "its.idx").read_text() == tar.with_suffix(".idx").read_text()


def test_the_plan_matches_history_and_says_so(source, shards):
    codec = json.loads((shards / "manifest.json").read_text())["codec"]
    assert codec["match_history"] and sum(codec["history"].values()) > 20
    photographs = [p for p in source.glob("*/*/train/nature/*") if p.stat().st_size > 0]
    qualities = {Image.open(io.BytesIO(p.read_bytes())).format for p in photographs[:5]}
    assert qualities == {"JPEG"}


def test_shards_are_shuffled_over_generators(shards):
    rows = ShardSet(shards, "train").rows
    first = rows["generator"][:15]
    assert len(set(first.tolist())) >= 3


@pytest.mark.parametrize("kind", ["foreign", "file", "all bad"])
def test_bad_places_are_one_line_and_leave_nothing(source, tmp_path, kind):
    if kind == "foreign":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.doc").touch()
        with pytest.raises(UserError, match="holds something else; choose an empty or new folder"):
            write(source, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["thesis.doc"]
    elif kind == "file":
        (tmp_path / "out").touch()
        with pytest.raises(UserError, match="cannot be written"):
            write(source, tmp_path / "out")
    else:
        shutil.copytree(source, tmp_path / "source")
        for path in (tmp_path / "source").glob("*/*/*/*/*"):
            path.write_bytes(b"")
        with pytest.raises(UserError, match="all 120 images were rejected"):
            write(tmp_path / "source", tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_layout_error_leaves_no_folder_behind(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError):
        write_shards(
            open_layout("genimage", tmp_path / "source"),
            tmp_path / "out",
            preset_policy("default"),
            quiet=True,
        )
    assert not (tmp_path / "out").exists()


def test_two_writers_on_one_folder_do_not_mix(source, repo_root, tmp_path):
    first = subprocess.Popen(
        command(source, tmp_path / "out", repo_root, "--workers", "1"),
        stdout=subprocess.DEVNULL,
        env=environment(),
    )
    wait_until(lambda: (tmp_path / "out" / ".work" / "plan.json").exists(), 60, "the plan")
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(0.2)
    second = subprocess.run(command(source, tmp_path / "out", repo_root), capture_output=True, text=True)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and "another process is writing it" in second.stderr
    assert first.wait(60) == 0


def test_genimage_mini(shared_data, tmp_path):
    """The real thing: 413 good files, exactly 3 rejected."""
    layout = open_layout(
        "genimage",
        shared_data / "genimage-mini",
        val_labels=shared_data / "genimage-mini-LOC_val_solution.csv",
    )
    manifest = write_shards(
        layout, tmp_path / "out", preset_policy("default", 64), samples_per_shard=60, quiet=True
    )
    reasons = [entry["reason"] for entry in manifest["rejected"]]
    assert len(reasons) == 3 and manifest["duplicates"]["exact"] == 0
    # The truncated photograph is none of the release's own.
    assert sum(reason.endswith("(known: it is broken in GenImage's release)") for reason in reasons) == 2
    assert "3 rejected (2 of them broken in GenImage's release), 0 kept" in summary(manifest)
    assert sum(entry["samples"] for entry in manifest["splits"].values()) == 413
    assert verify_shards(tmp_path / "out") == (413, [])


def test_a_broken_file_of_the_release_is_recognised_when_rejected_and_kept_when_repaired(tmp_path):
    names = ["033_sdv4_00134", "033_sdv4_00137", "033_sdv4_00135", "033_sdv4_00136"]
    images = tmp_path / "stable_diffusion_v_1_4" / "train" / "ai"
    images.mkdir(parents=True)
    for number, name in enumerate(names):
        picture = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(picture).save(images / f"{name}.png")
    for name in ("033_sdv4_00134", "033_sdv4_00135"):
        (images / f"{name}.png").write_bytes(b"")
    layout = open_layout("genimage", tmp_path, val_fraction=0)
    policy = preset_policy("default", 32)
    manifest = write_shards(layout, tmp_path / "out", policy, quiet=True, allow_one_class=True)
    assert manifest["splits"]["train"]["samples"] == 2
    assert [entry["reason"] for entry in manifest["rejected"]] == [
        "zero bytes (known: it is broken in GenImage's release)",
        "zero bytes",
    ]
