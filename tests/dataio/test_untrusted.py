"""Data are data: archives that lead elsewhere, bombs, and code in what is read."""

import ast
import io
import json
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest

from dataio.core.errors import UserError
from dataio.images.opening import Undecodable, open_image
from dataio.layouts import open_layout
from dataio.sharding.verify import verify_shards
from dataio.shards.manifest import read_manifest, sha256_of
from dataio.shards.shard_set import ShardSet
from dataio.sources import source
from dataio.sources.inputs import find_inputs
from dataio.sources.source import Source
from dataio.vqa.conversations import tar_members
from engines.config.detector import parse_config
from engines.experiments.grid import read_grid

PACKAGES = ("dataio", "models", "engines", "launch")


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


MEMBERS = {
    "absolute": member("/etc/passwd"),
    "above": member("a/../../b.jpg"),
    "symbolic link": member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("a.jpg", tarfile.LNKTYPE, "b.jpg"),
    "character device": member("a.jpg", tarfile.CHRTYPE),
    "block device": member("a.jpg", tarfile.BLKTYPE),
    "pipe": member("a.jpg", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_tar_of_conversations_that_leads_elsewhere_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(member("folder", tarfile.DIRTYPE))
        tar.addfile(member("b.jpg"))
        tar.addfile(MEMBERS[kind])
    with pytest.raises(UserError, match="unsafe tar, make it again"):
        tar_members(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("kind", MEMBERS)
def test_such_members_are_faults_of_a_shard(copy, kind):
    path = copy / "test" / "000000.tar"
    with tarfile.open(path) as tar:
        whole = [(m, content.read()) for m in tar.getmembers() if (content := tar.extractfile(m))]
    for place in (0, 1):  # in place of an image, and of its JSON
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (info, data) in enumerate(whole):
                if number != place:
                    tar.addfile(info, io.BytesIO(data))
                elif kind in ("absolute", "above"):
                    tar.addfile(MEMBERS[kind])
                else:
                    bad = member(info.name, MEMBERS[kind].type, MEMBERS[kind].linkname)
                    tar.addfile(bad)
        _, faults = verify_shards(copy)
        assert any("members are" in fault for fault in faults)


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.tar", "train/../../x.tar", "train/x.txt", 5])
def test_a_manifest_cannot_lead_out_of_its_folder(copy, name):
    change_manifest(copy, lambda m: m["splits"]["train"]["shards"][0].update(file=name))
    for read in (read_manifest, lambda folder: ShardSet(folder, "test"), verify_shards):
        with pytest.raises(UserError, match=r"splits\.train\.shards\[0\]\.file is"):
            read(copy)


def test_an_index_with_objects_in_it_runs_no_code(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    path = copy / "train" / "index.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    change_manifest(
        copy,
        lambda m: m["splits"]["train"]["index"].update(bytes=path.stat().st_size, sha256=sha256_of(path)),
    )
    with pytest.raises(UserError, match="not a sample index"):
        ShardSet(copy, "train")
    assert any("not a sample index" in fault for fault in verify_shards(copy)[1])
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg"])
def test_a_zip_that_leads_elsewhere_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("train/REAL/0.jpg", b"")
        archive.writestr(name, b"")
    for layout in ("cifake", "genimage"):
        with pytest.raises(UserError, match="unsafe zip: member"):
            list(open_layout(layout, tmp_path / "x.zip").records())
    (found,) = find_inputs([str(tmp_path / "x.zip")], io.BytesIO())
    assert "unsafe zip" in found.error


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"\0" * 2**20)
    (tmp_path / "b.jpg").write_bytes(b"\0" * 2**20)
    os.mkfifo(tmp_path / "c.jpg")
    monkeypatch.setattr(source, "MAX_FILE_BYTES", 2**20 - 1)
    for place, name in (("x.zip", "a.jpg"), (".", "b.jpg")):
        with pytest.raises(OSError, match="expected an image of at most"):
            Source(tmp_path / place).read(name)
    with pytest.raises(OSError, match="neither a file nor a folder"):  # would wait for ever
        Source(tmp_path).read("c.jpg")


def test_an_image_of_too_many_pixels_is_refused():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    with pytest.raises(Undecodable, match="3600 megapixels, more than the limit of 200"):
        open_image(png)


def test_yaml_runs_no_code(tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "x.yaml").write_text(f"run:\n  dir: !!python/object/apply:os.mkdir ['{trap}']\n")
    with pytest.raises(UserError):
        parse_config([], tmp_path / "x.yaml")
    with pytest.raises(UserError):
        read_grid(tmp_path / "x.yaml")
    assert not trap.exists()


def calls(repo_root):
    for package in PACKAGES:
        for path in sorted((repo_root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(repo_root)}:{node.lineno}", ast.unparse(node.func), node
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    module = getattr(node, "module", None)
                    for alias in node.names:
                        yield f"{path.relative_to(repo_root)}:{node.lineno}", module or alias.name, node


def test_the_code_uses_nothing_that_runs_what_it_reads(repo_root):
    found, loads = [], 0
    for place, name, node in calls(repo_root):
        given = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", [])}
        loads += name == "torch.load"
        if (
            given.get("shell", "False") != "False"
            or name in ("os.system", "os.popen", "eval", "exec", "pickle", "marshal", "shelve", "dill")
            or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
            or name.endswith((".extractall", ".extract"))
            or (name == "torch.load" and given.get("weights_only") != "True")
            or given.get("allow_pickle", "False") != "False"
            or given.get("trust_remote_code", "False") != "False"
        ):
            found.append(f"{place}: {name}")
    assert found == []
    assert loads >= 2  # the search sees what there is
