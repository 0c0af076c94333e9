"""Whatever lies in a file, a parser reads it or raises a UserError of one line: nothing else, and no hang."""

import contextlib
import copy
import io
import json
import math
import shutil
import string
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dataio.audit_stored import audit_line
from dataio.conversations import read_conversations, tar_members
from dataio.errors import UserError
from dataio.groups import read_groups
from dataio.index import ShardSet, read_manifest, sha256_of
from dataio.layouts.cifake import CifakeLayout
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.manifest import ManifestLayout
from dataio.quarantine import Quarantine
from dataio.shard_table import to_entries
from dataio.verify import verify_shards
from engines import checkpoints
from engines.calibration import load_calibration
from engines.config import parse_as, parse_config
from engines.finetune_config import FinetuneConfig
from engines.grid import read_grid
from engines.vqa_answers import read_items

LONG = settings.get_current_profile_name() == "long"
if not LONG:
    settings.load_profile("short")


@contextlib.contextmanager
def parsed_or_told():
    """The one property of this file."""
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip()


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` cut, with bytes changed, a part doubled or removed, or replaced by noise."""
    places = st.integers(0, max(0, len(data) - 1))

    def change(edits):
        found = bytearray(data)
        for kind, place, value in edits:
            place = min(place, len(found))
            if kind == "byte" and place < len(found):
                found[place] = value[0] if value else 0
            elif kind == "insert":
                found[place:place] = value
            elif kind == "remove":
                del found[place : place + 1 + len(value)]
            elif kind == "cut":
                del found[place:]
            elif kind == "again":
                found += found[place : place + 64]
        return bytes(found)

    kinds = st.sampled_from(["byte", "byte", "byte", "insert", "remove", "cut", "again"])
    edits = st.lists(st.tuples(kinds, places, st.binary(max_size=12)), min_size=1, max_size=6)
    return edits.map(change) | st.binary(max_size=600)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "train/000000.tar", "nature", "\0", "\ud800"])
)
values = st.recursive(
    leaves,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=6,
)


def paths_of(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix] * bool(prefix) + [p for key, value in items for p in paths_of(value, (*prefix, key))]


def grafted(tree: Any) -> st.SearchStrategy[Any]:
    """`tree` with one or two parts replaced by any value, or removed."""

    def graft(edits):
        found = copy.deepcopy(tree)
        for path, value, remove in edits:
            place = found
            try:
                for key in path[:-1]:
                    place = place[key]
                if remove:
                    del place[path[-1]]
                else:
                    place[path[-1]] = value
            except (KeyError, IndexError, TypeError):
                continue  # an earlier edit took it away
        return found

    edit = st.tuples(st.sampled_from(paths_of(tree)), values, st.booleans())
    return st.lists(edit, min_size=1, max_size=2).map(graft) | values


def dump(tree: Any) -> str:
    return json.dumps(tree, default=str)


@pytest.fixture(scope="module")
def shards(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "shards"
    shutil.copytree(tiny_shards, folder)
    return folder


@pytest.fixture
def whole(shards, tiny_shards):
    """The folder, put back in order after the test."""
    yield shards
    shutil.rmtree(shards)
    shutil.copytree(tiny_shards, shards)


def open_and_read(folder: Path) -> None:
    with parsed_or_told():
        read_manifest(folder)
    with parsed_or_told():
        found = ShardSet(folder, "test")
        for number in (0, len(found) - 1):
            found.read(number)
            found.about(number)
            found.image_sizes()


def test_manifest(whole):
    good = json.loads((whole / "manifest.json").read_text())

    @given(grafted(good) | grafted(good["splits"]["test"]).map(lambda t: {**good, "splits": {"test": t}}))
    def run(tree):
        (whole / "manifest.json").write_text(dump(tree))
        open_and_read(whole)

    run()


def test_manifest_as_bytes(whole):
    good = (whole / "manifest.json").read_bytes()

    @given(mutated(good))
    @example(b"[" * 100_000)
    @example(b"\xff\xfe")
    def run(data):
        (whole / "manifest.json").write_bytes(data)
        open_and_read(whole)

    run()


def test_sample_index(whole):
    path = whole / "test" / "index.npy"
    good, manifest = path.read_bytes(), json.loads((whole / "manifest.json").read_text())

    @given(mutated(good))
    @example(b"PK\x03\x04" + good)
    @example(good[:10])
    def run(data):
        path.write_bytes(data)
        manifest["splits"]["test"]["index"]["bytes"] = len(data)
        (whole / "manifest.json").write_text(json.dumps(manifest))
        open_and_read(whole)

    run()


def test_shard_table(whole):
    path = whole / "test" / "shards.npy"
    manifest = json.loads((whole / "manifest.json").read_text())
    shards = manifest["splits"]["test"].pop("shards")
    np.save(path, to_entries(shards))
    good, manifest["version"] = path.read_bytes(), 2

    @given(mutated(good), st.booleans())
    @example(good, True)
    def run(data, fitting):
        path.write_bytes(data)
        facts = {"bytes": len(data), "sha256": sha256_of(path) if fitting else "0" * 64}
        manifest["splits"]["test"]["table"] = {"file": "test/shards.npy", "shards": len(shards), **facts}
        (whole / "manifest.json").write_text(json.dumps(manifest))
        open_and_read(whole)
        with parsed_or_told():
            verify_shards(whole)

    run()


def test_sample_index_values(whole):
    path = whole / "test" / "index.npy"
    good = np.load(path)
    names = st.sampled_from(good.dtype.names)

    @given(st.lists(st.tuples(names, st.integers(0, 2**64 - 1)), min_size=1, max_size=3), st.booleans())
    def run(edits, last):
        rows = good.copy()
        for name, value in edits:
            kind = rows.dtype[name]
            rows[name][-1 if last else 0] = np.array([value % 2 ** (8 * kind.itemsize)], np.uint64).astype(
                kind
            )[0]
        np.save(path, rows)
        open_and_read(whole)

    run()


def test_shard(whole):
    path = whole / "test" / "000000.tar"
    good = path.read_bytes()
    manifest = json.loads((whole / "manifest.json").read_text())

    @settings(max_examples=3000 if LONG else 15)
    @given(mutated(good[:3000]))
    def run(data):
        path.write_bytes(data + good[3000:])
        manifest["splits"]["test"]["shards"][0]["bytes"] = path.stat().st_size
        (whole / "manifest.json").write_text(json.dumps(manifest))
        open_and_read(whole)
        with parsed_or_told():
            verify_shards(whole)

    run()


def tar_of(names: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in names:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


SAMPLE = {
    "id": "a",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Fake."}],
    "metadata": {"generator": "adm"},
}


def test_tar_of_conversations(tmp_path):
    good = tar_of([("a.json", json.dumps(SAMPLE).encode()), ("a.jpg", b"jpeg"), ("b" * 150 + ".json", b"{}")])
    (tmp_path / "set").mkdir()

    @given(mutated(good) | mutated(good[:1024]).map(lambda data: data + good[1024:]))
    def run(data):
        (tmp_path / "set" / "x.tar").write_bytes(data)
        tar_members.cache_clear()
        with parsed_or_told():
            tar_members(str(tmp_path / "set" / "x.tar"))
        with parsed_or_told():
            read_conversations(tmp_path / "set")

    run()


def test_conversations(tmp_path):
    @given(
        grafted([SAMPLE, {**SAMPLE, "id": "b"}]).map(dump).map(str.encode) | mutated(dump([SAMPLE]).encode())
    )
    @example(b"[" * 100_000)
    def run(data):
        (tmp_path / "x.json").write_bytes(data)
        with parsed_or_told():
            read_conversations(tmp_path / "x.json")

    run()


def test_benchmark(tmp_path):
    item = {
        "id": "1",
        "image": "a.jpg",
        "question": "Real?",
        "ground_truth": "Fake",
        "metadata": {"kind": "x"},
    }

    @given(grafted([item]).map(dump).map(str.encode) | mutated(dump([item]).encode()))
    @example(b"[" * 100_000)
    def run(data):
        (tmp_path / "x.json").write_bytes(data)
        with parsed_or_told():
            read_items(tmp_path / "x.json")

    run()


CSV = b'path,generator,object,split,group\na/1.jpg,nature,cat,train,g1\na/2.jpg,adm,,test,\n"b,3.jpg",adm,dog,val,g2\n'


def test_csv_manifest(tmp_path):
    @given(mutated(CSV), st.booleans())
    @example(b"path,generator,object\n" + b"x" * 200_000 + b",nature,\n", False)
    @example(b"path,generator,object\na\0b.jpg,nature,\n", False)
    @example(b"path,generator,object,path\na,nature,,\n", True)
    def run(data, skip):
        (tmp_path / "x.csv").write_bytes(data)
        with parsed_or_told():
            list(ManifestLayout(tmp_path / "x.csv", skip_unknown=skip).records())
        with parsed_or_told():
            read_groups(tmp_path / "x.csv")

    run()


PARTS = [
    *(
        "ai",
        "nature",
        "train",
        "val",
        "test",
        "REAL",
        "FAKE",
        "wukong",
        "ADM",
        "imagenet_ai_0508_adm",
        "glide",
    ),
    *(
        "0_adm_174.PNG",
        "n01440764_1.JPEG",
        "ILSVRC2012_val_00000293.JPEG",
        "0001.jpg",
        "9999_adm_1.png",
        "é.jpg",
    ),
    *("99999999999999999999_adm_1.png", "GLIDE_1000_200_07_808_glide_00033.png", "1_sdv5_x.png"),
]
words = st.sampled_from(PARTS) | st.text(
    string.ascii_letters + string.digits + "_-. ()", min_size=1, max_size=9
)


@pytest.mark.parametrize("kind", [GenImageLayout, CifakeLayout])
def test_names_of_files(tmp_path, kind):
    @given(
        st.lists(st.lists(words, min_size=1, max_size=5).map("/".join), min_size=1, max_size=8), st.booleans()
    )
    def run(names, skip):
        # Real files: names that a file system refuses cannot occur.
        folder = tmp_path / "tree"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            with contextlib.suppress(OSError):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        with parsed_or_told():
            list(kind(folder, skip_unknown=skip).records())

    run()


YAML = b"""
run: {dir: x, seed: 1}
data:
  shards: y
  scale: [0.2, 1.0]
  mean: [0.1, 0.2, 0.3]
model: {backbone: resnet18}
optim:
  lr: 0.1
"""
TREE = yaml.safe_load(YAML)


def dump_yaml(tree):
    return yaml.safe_dump(tree).encode("utf-8", "replace")


def parse_finetune(argv, file):
    return parse_as(FinetuneConfig, argv, file)


@pytest.mark.parametrize("read", [parse_config, parse_finetune])
def test_configuration(tmp_path, read):
    @settings(max_examples=1000 if LONG else 12)
    @given(grafted(TREE).map(dump_yaml) | mutated(YAML))
    @example(b"&a [*a, *a]")
    @example(b"a: &a {b: *a}")
    @example(b"- 1")
    @example(b"\0")
    def run(data):
        (tmp_path / "x.yaml").write_bytes(data)
        with parsed_or_told():
            read([], tmp_path / "x.yaml")

    run()


def test_sweep(tmp_path):
    good = b"method: grid\nparameters:\n  optim.lr: {values: [0.1, 0.2]}\n  run.seed: {value: 3}\n"

    @given(
        grafted(yaml.safe_load(good)).map(yaml.safe_dump).map(lambda t: t.encode("utf-8", "replace"))
        | mutated(good)
    )
    @example(b"&a [*a]")
    @example(b"method: grid\nparameters: {1: {values: [1, 2]}, [a]: {value: 3}}\n")
    def run(data):
        (tmp_path / "x.yaml").write_bytes(data)
        with parsed_or_told():
            read_grid(tmp_path / "x.yaml")

    run()


def test_checkpoint(tmp_path):
    state = {"format": checkpoints.FORMAT, "version": 1, "model": {"w": torch.arange(6.0)}, "step": 3}
    checkpoints.save(tmp_path / "good.pt", state)
    good = (tmp_path / "good.pt").read_bytes()

    @given(mutated(good))
    def run(data):
        (tmp_path / "x.pt").write_bytes(data)
        with parsed_or_told():
            checkpoints.load(tmp_path / "x.pt")

    run()


def test_checkpoint_contents(tmp_path):
    good = {"format": checkpoints.FORMAT, "version": 1, "model": {"w": 1.0}, "labels": {}, "config": {}}

    @given(grafted(good))
    def run(tree):
        torch.save(tree, tmp_path / "x.pt")
        with parsed_or_told():
            checkpoints.load(tmp_path / "x.pt")

    run()


def test_safetensors(tmp_path):
    metadata = {"format": '"x"', "version": "1", "labels": "{}", "config": "{}", "step": "3"}
    save_file({"w": torch.arange(6.0)}, tmp_path / "good.safetensors", metadata=metadata)
    good = (tmp_path / "good.safetensors").read_bytes()

    @given(mutated(good))
    def run(data):
        (tmp_path / "x.safetensors").write_bytes(data)
        with parsed_or_told():
            checkpoints.load(tmp_path / "x.safetensors")

    run()


AUDIT = {
    "format": "telltale-audit",
    "version": 1,
    "verdict": "pass",
    "short": [],
    "source": {"manifest_sha256": "0"},
    "splits": ["train"],
}


def test_audit(whole):
    @given(grafted(AUDIT).map(dump).map(str.encode) | mutated(dump(AUDIT).encode()), st.booleans())
    @example(b"[" * 100_000, True)
    def run(data, required):
        (whole / "audit.json").write_bytes(data)
        with parsed_or_told():
            audit_line(whole, required=required)

    run()


CALIBRATION = {
    "format": "telltale-calibration",
    "version": 1,
    "weights_sha256": "0" * 64,
    "temperature": 1.5,
    "thresholds": {"fake": 0.9, "real": 0.1},
}


def test_calibration(tmp_path):
    @given(grafted(CALIBRATION).map(dump).map(str.encode) | mutated(dump(CALIBRATION).encode()))
    @example(b"[" * 100_000)
    def run(data):
        (tmp_path / "best.calibration.json").write_bytes(data)
        with parsed_or_told():
            load_calibration(tmp_path / "best.pt", {"w": torch.zeros(1)})

    run()


def test_quarantine(shards, tmp_path):
    opened = ShardSet(shards, "train")
    line = {"split": "train", "sample_id": 3, "shard": "train/000000.tar", "key": 4}

    @given(grafted(line).map(dump).map(str.encode) | mutated(dump(line).encode() * 2))
    @example(b'{"split": "train", "sample_id": 99999999}\n')
    @example(b'{"split": "train", "sample_id": 1e999}\n')
    @example(b"[" * 100_000)
    def run(data):
        (tmp_path / "quarantine.jsonl").write_bytes(data)
        with parsed_or_told():
            found = Quarantine(opened, tmp_path / "quarantine.jsonl", 0.5)
            assert all(0 <= number < len(opened) for number in found.ids)

    run()
    assert math.ceil(0.5 * len(opened)) == Quarantine(opened, tmp_path / "none", 0.5).allowed
