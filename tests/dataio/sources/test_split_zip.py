"""Zips in several parts, made by the programs that people publish with."""

import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from dataio.core.errors import UserError
from dataio.layouts import open_layout
from dataio.layouts.synthetic import write_synthetic
from dataio.sources.source import Source

needs_zip = pytest.mark.skipif(not shutil.which("zip"), reason="needs Info-ZIP: apt install zip")
needs_7z = pytest.mark.skipif(not shutil.which("7z"), reason="needs 7-Zip: apt install 7zip")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """40 files of 1 to 30 kB that do not compress, one empty, in two folders."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    for number in range(40):
        path = folder / f"part{number % 2}" / f"{number:03d}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw.randbytes(draw.randrange(1, 30_000)) if number else b"")
    return folder


def pack(files: Path, *command: str) -> None:
    subprocess.run(command, cwd=files, check=True, capture_output=True)


def check_equal(files: Path, archive: Path) -> None:
    source = Source(archive)
    names = sorted(str(p.relative_to(files)) for p in files.rglob("*.bin"))
    assert list(source.files()) == names
    for name in random.Random(1).sample(names, len(names)):
        assert source.read(name) == (files / name).read_bytes()


@needs_zip
@pytest.mark.parametrize("options", [[], ["-fz"], ["-0", "-fz"]], ids=["zip32", "zip64", "stored"])
def test_split_archives_of_info_zip(files, tmp_path, options):
    pack(files, "zip", "-r", "-s", "100k", *options, str(tmp_path / "all.zip"), "part0", "part1")
    assert (tmp_path / "all.z04").is_file()
    check_equal(files, tmp_path / "all.zip")


@needs_zip
def test_a_directory_that_begins_in_an_earlier_part(tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1500):
        (many / f"{number:04d}-{'x' * 80}.bin").write_bytes(b"%d" % number)
    pack(many, "zip", "-r", "-s", "64k", str(tmp_path / "all.zip"), ".")
    source = Source(tmp_path / "all.zip")
    for name in source.files():
        assert source.read(name) == b"%d" % int(name[:4])


@needs_7z
def test_plain_cuts_of_7_zip(files, tmp_path):
    pack(files, "7z", "a", "-tzip", "-v100k", str(tmp_path / "all.zip"), "part0", "part1")
    assert (tmp_path / "all.zip.004").is_file()
    check_equal(files, tmp_path / "all.zip.001")
    last = sorted(tmp_path.glob("all.zip.*"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=rf"parts do not make a zip .* is {last.name} missing\?"):
        list(Source(tmp_path / "all.zip.001").files())


@needs_zip
def test_a_missing_part_is_named(files, tmp_path):
    pack(files, "zip", "-r", "-s", "100k", str(tmp_path / "all.zip"), "part0")
    (tmp_path / "all.z02").unlink()
    with pytest.raises(UserError, match=r"all\.zip: is the last of \d parts, all\.z02 is not beside it"):
        list(Source(tmp_path / "all.zip").files())
    with pytest.raises(UserError, match=r"all\.z01: a part of an archive; give its \.zip"):
        Source(tmp_path / "all.z01")


@needs_zip
def test_a_layout_reads_a_split_archive_as_its_folder(tmp_path):
    write_synthetic(tmp_path / "source", images=40, size=32)
    pack(tmp_path / "source", "zip", "-r", "-s", "64k", str(tmp_path / "all.zip"), ".")
    assert (tmp_path / "all.z01").is_file()
    folder, archive = (open_layout("synthetic", tmp_path / name) for name in ("source", "all.zip"))
    records = list(folder.records())
    assert [(r.path, r.split) for r in archive.records()] == [(r.path, r.split) for r in records]
    for record in records:
        assert archive.read(record.path) == folder.read(record.path)


def test_an_ordinary_zip_stays_one(files, tmp_path):
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for path in sorted(files.rglob("*.bin")):
            archive.write(path, path.relative_to(files))
    check_equal(files, tmp_path / "one.zip")
