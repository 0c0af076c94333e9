"""Whatever lies in a file, a parser reads it or raises a UserError of one line: nothing else, and no hang."""

import contextlib
import io
import json
import shutil
import string
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataio.layouts.cifake import CifakeLayout
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding.verify import verify_shards
from dataio.shards.groups import read_groups
from dataio.shards.manifest import read_manifest, sha256_of
from dataio.shards.shard_set import ShardSet
from dataio.shards.shard_table import to_entries
from dataio.vqa.conversations import read_conversations, tar_members
from engines.mlm.vqa_answers import read_items
from tests.fuzz.almost import LONG, dump, grafted, mutated, parsed_or_told


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
    @example(good.replace(b"'fortran_order'", b"b'ortran_order'"))
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
    @example(b'path,generator,object,group\n"a\nb",nature,,g\n"a\nb",nature,,h\n', False)
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
