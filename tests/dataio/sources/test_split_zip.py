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
    with pytest.raises(UserError, match=r"all\.z01: a part of an archive; give its last part, all\.zip"):
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


def join(target: Path, *parts: Path) -> Path:
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target


@needs_zip
@pytest.mark.parametrize("options", [[], ["-fz"], ["-0", "-fz"]], ids=["zip32", "zip64", "stored"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_split_archive_whose_parts_were_joined_with_cat(files, tmp_path, options, beside):
    pack(files, "zip", "-r", "-s", "100k", *options, str(tmp_path / "all.zip"), "part0", "part1")
    parts = [*sorted(tmp_path.glob("all.z0*")), tmp_path / "all.zip"]
    assert len(parts) > 3
    # Also in place of the last part, the others still beside it.
    whole = join(tmp_path / "whole.zip", *parts)
    if beside:
        whole = whole.rename(tmp_path / "all.zip")
    check_equal(files, whole)


@needs_zip
def test_a_member_of_many_parts_in_a_joined_archive(tmp_path):
    draw, folder = random.Random(0), tmp_path / "big"
    folder.mkdir()
    for number, size in enumerate((10, 300_000, 20, 200_000, 30)):
        (folder / f"{number}.bin").write_bytes(draw.randbytes(size))
    pack(folder, "zip", "-r", "-s", "64k", str(tmp_path / "all.zip"), ".")
    whole = join(tmp_path / "w.zip", *sorted(tmp_path.glob("all.z0*")), tmp_path / "all.zip")
    check_equal(folder, whole)


@needs_zip
def test_a_joined_archive_that_misses_a_part(files, tmp_path):
    pack(files, "zip", "-r", "-s", "100k", str(tmp_path / "all.zip"), "part0", "part1")
    parts = sorted(tmp_path.glob("all.z0*"))
    whole = join(tmp_path / "my w.zip", parts[0], *parts[2:], tmp_path / "all.zip")
    with pytest.raises(UserError, match=r"zip -FF 'my w\.zip' --out whole\.zip"):
        list(Source(whole).files())


@needs_zip
def test_parts_in_capitals(files, tmp_path):
    pack(files, "zip", "-r", "-s", "100k", str(tmp_path / "all.zip"), "part0", "part1")
    for part in list(tmp_path.iterdir()):
        part.rename(part.with_name(part.name.upper()))
    check_equal(files, tmp_path / "ALL.ZIP")
    (tmp_path / "ALL.ZIP").rename(tmp_path / "ALL.zip")
    check_equal(files, tmp_path / "ALL.zip")
    with pytest.raises(UserError, match=r"ALL\.Z01: a part of an archive; give its last part, ALL\.zip$"):
        Source(tmp_path / "ALL.Z01")


@pytest.fixture(scope="module")
def one_zip(files, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("one") / "one.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(files.rglob("*.bin")):
            archive.write(file, file.relative_to(files))
    return path.read_bytes()


def cut(data: bytes, folder: Path, *names: str) -> None:
    size = -(-len(data) // len(names))
    for number, name in enumerate(names):
        (folder / name).write_bytes(data[number * size : (number + 1) * size])


@pytest.mark.parametrize("suffix", [".000", ".00", ".0", ".001", ".01"])
def test_plain_cuts_of_split(files, one_zip, tmp_path, suffix):
    first, digits = int(suffix[1:]), len(suffix) - 1
    cut(one_zip, tmp_path, *(f"a.zip.{first + number:0{digits}d}" for number in range(3)))
    check_equal(files, tmp_path / f"a.zip{suffix}")
    if first == 0 and digits > 1:
        with pytest.raises(UserError, match=rf"give its first part, a\.zip\.{'0' * digits}$"):
            Source(tmp_path / f"a.zip.{1:0{digits}d}")


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (("my set.z000", "my set.z001", "my set.z002"), r"cat my\ set.z[0-9][0-9][0-9] > my\ set.zip"),
        (("a.z00", "a.z01"), "cat a.z[0-9][0-9] > a.zip"),
        (("a.aa", "a.ab", "a.ac"), "cat a.[a-z][a-z] > a.zip"),
        (("a.zip.aa", "a.zip.ab"), "cat a.zip.[a-z][a-z] > a.zip"),
        (("a.zip.partaa", "a.zip.partab"), "cat a.zip.part[a-z][a-z] > a.zip"),
        (("a.000", "a.001"), "cat a.[0-9][0-9][0-9] > a.zip"),
        (("a.part01", "a.part02"), "cat a.part[0-9][0-9] > a.zip"),
    ],
)
def test_pieces_of_other_names_are_joined_by_the_command_of_the_message(
    files, one_zip, tmp_path, names, command
):
    cut(one_zip, tmp_path, *names)
    for name in names:
        with pytest.raises(UserError, match="one of the pieces of a cut zip") as error:
            list(Source(tmp_path / name).files())
        assert f"`{command}`" in str(error.value) and f"({names[0]} to {names[-1]})" in str(error.value)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    check_equal(files, next(tmp_path.glob("*.zip")))


def test_what_is_no_zip_says_why(one_zip, tmp_path):
    (tmp_path / "cut.zip").write_bytes(one_zip[:5000])
    with pytest.raises(UserError, match=r"is a zip file that ends early \(5,000 bytes\); download it again"):
        Source(tmp_path / "cut.zip")
    (tmp_path / "none.zip").touch()
    with pytest.raises(UserError, match=r"is empty \(0 bytes\); download it again"):
        Source(tmp_path / "none.zip")
    (tmp_path / "split.z01").write_bytes(b"PK\x07\x08")
    (tmp_path / "split.zip").write_bytes(b"data without an end")
    with pytest.raises(UserError, match=r"is the last part of a split archive and ends early \(19 bytes\)"):
        Source(tmp_path / "split.zip")
    (tmp_path / "page.zip").write_text("\n<!DOCTYPE html><html>too many downloads")
    with pytest.raises(UserError, match="is a web page"):
        Source(tmp_path / "page.zip")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match="neither a folder nor a zip file"):
        Source(tmp_path / "photo.jpg")
    (tmp_path / "b.zip.002").write_bytes(b"x")
    (tmp_path / "c.z01").write_bytes(one_zip[:100])
    with pytest.raises(UserError, match="whose first part is not beside it"):
        Source(tmp_path / "b.zip.002")
    with pytest.raises(UserError, match=r"whose last part, c\.zip, is not beside it"):
        Source(tmp_path / "c.z01")


def test_links_that_lead_in_a_circle_are_named(tmp_path):
    folder = tmp_path / "set" / "ADM" / "train" / "ai"
    folder.mkdir(parents=True)
    (folder / "0_adm_1.PNG").write_bytes(b"x")
    (folder / "self").symlink_to("self")
    with pytest.raises(UserError, match=r"ADM/train/ai/self \("):
        list(open_layout("genimage", tmp_path / "set").records())
    (folder / "self").unlink()
    (tmp_path / "set" / "ADM" / "train" / "up").symlink_to("../..")
    for layout in ("genimage", "cifake", "synthetic"):
        with pytest.raises(UserError, match=r"ADM/train/up: a link to .*/set, a folder above it"):
            list(open_layout(layout, tmp_path / "set").records())
    with pytest.raises(OSError, match="a link to self: Too many levels"):
        (folder / "self.png").symlink_to("self")
        (folder / "self").symlink_to("self")
        Source(tmp_path / "set").read("ADM/train/ai/self.png")
