"""Verifying a folder finds every kind of damage and names it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dataio.sharding.verify import verify_shards
from dataio.shards.manifest import sha256_of


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def flip(data):
    data[700] ^= 64
    return data


def swap_labels(folder):
    path = folder / "train" / "index.npy"
    rows = np.load(path)
    rows["generator"] = (rows["generator"] + 1) % 3
    np.save(path, rows)


DAMAGE = {
    "flipped bit": (lambda f: rewrite(f / "train/000001.tar", flip), "train/000001.tar: its SHA-256"),
    "truncated": (
        lambda f: rewrite(f / "train/000001.tar", lambda d: d[:3000]),
        "train/000001.tar: 3000 bytes",
    ),
    "missing": (lambda f: (f / "test/000000.tar").unlink(), "test/000000.tar: missing"),
    "stale idx": (lambda f: rewrite(f / "train/000002.idx", lambda d: d[:-5]), "train/000002.idx: "),
    "other labels": (swap_labels, "train/index.npy: its SHA-256"),
    "stranger": (
        lambda f: shutil.copy(f / "train/000001.tar", f / "train/000099.tar"),
        "000099.tar: not in the manifest",
    ),
}


def test_an_untouched_folder_is_in_order(tiny_shards):
    checked, faults = verify_shards(tiny_shards, workers=2)
    assert faults == [] and checked > 100


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(copy, kind):
    spoil, expected = DAMAGE[kind]
    spoil(copy)
    _, faults = verify_shards(copy)
    assert any(expected in fault for fault in faults), faults


def test_a_wrong_index_is_found_even_where_its_hash_was_made_to_fit(copy):
    swap_labels(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["index"]["sha256"] = sha256_of(copy / "train" / "index.npy")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    _, faults = verify_shards(copy)
    assert any("labels are" in fault for fault in faults)


def test_the_command_names_the_first_faults_and_exits_2(copy, repo_root):
    rewrite(copy / "train/000001.tar", flip)
    script = str(repo_root / "launch" / "shard.py")
    done = subprocess.run([sys.executable, script, "verify", str(copy)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "train/000001.tar: its SHA-256" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
