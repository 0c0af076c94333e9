"""Paths as a user gives them: the images they lead to, and the reasons of those that lead nowhere."""

import io
import os
import zipfile
from pathlib import Path

import pytest

from dataio.sources.inputs import find_inputs


def _find(*paths, stdin=b"", null=False):
    return list(find_inputs([str(p) for p in paths], io.BytesIO(stdin), null=null))


def _names(found, folder):
    return [os.path.relpath(one.path, folder) for one in found if not one.error]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.jpg",
        "a.PNG",
        "notes.txt",
        "sub/c.webp",
        "sub/deep/d.tif",
        ".hidden.jpg",
        "sub/.x/e.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_a_folder_gives_its_images_in_order(folder):
    found = _find(folder)
    assert _names(found, folder) == ["a.PNG", "b.jpg", "sub/c.webp", "sub/deep/d.tif"]
    assert [one.read() for one in found] == [b"a.PNG", b"b.jpg", b"sub/c.webp", b"sub/deep/d.tif"]


def test_files_are_taken_whatever_they_are_called(folder):
    assert [one.read() for one in _find(folder / "notes.txt", folder / "b.jpg")] == [b"notes.txt", b"b.jpg"]


def test_globs_also_where_folders_are_linked_in_circles(folder):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "loop2").symlink_to(folder)
    assert _names(_find(folder / "*.jpg"), folder) == ["b.jpg"]
    assert _names(_find(folder / "**" / "*.webp"), folder) == ["sub/c.webp"]
    # A file of that very name is no glob.
    (folder / "[b].jpg").write_bytes(b"odd")
    assert [one.read() for one in _find(folder / "[b].jpg")] == [b"odd"]
    (one,) = _find(folder / "*.bmp")
    assert one.read is None and one.error == "no file matches"


def test_links_in_circles_end(folder):
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "self.jpg").symlink_to("self.jpg")
    found = _find(folder)
    assert _names(found, folder) == ["a.PNG", "b.jpg", "sub/c.webp", "sub/self.jpg", "sub/deep/d.tif"]
    with pytest.raises(OSError, match="symbolic links"):
        found[3].read()


def test_a_zip_gives_its_images_as_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x/1.jpg", "2.png", "readme.txt", "__MACOSX/1.jpg"):
            archive.writestr(name, name)
    found = _find(tmp_path / "a.zip")
    assert _names(found, tmp_path) == ["a.zip/2.png", "a.zip/x/1.jpg"]
    assert [one.read() for one in found] == [b"2.png", b"x/1.jpg"]


def test_a_damaged_zip_is_one_error_or_one_per_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", b"picture one")
        archive.writestr("2.jpg", b"picture two")
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    (tmp_path / "bit.zip").write_bytes(whole.replace(b"picture one", b"pictura one", 1))
    (one,) = _find(tmp_path / "cut.zip")
    assert one.read is None and "ends early" in one.error and "\n" not in one.error
    first, second = _find(tmp_path / "bit.zip")
    with pytest.raises(OSError, match="CRC"):
        first.read()
    assert second.read() == b"picture two"


def test_a_member_that_would_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("dataio.sources.source.MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", bytes(100_000))
    (tmp_path / "2.jpg").write_bytes(bytes(1001))
    for one in _find(tmp_path / "a.zip", tmp_path / "2.jpg"):
        with pytest.raises(OSError, match="expected an image of at most"):
            one.read()


def test_lists_on_standard_input(folder):
    lines = f"{folder}/b.jpg\r\n\n{folder}/sub\n{folder}/a.PNG".encode()
    assert _names(_find("-", stdin=lines), folder) == ["b.jpg", "sub/c.webp", "sub/deep/d.tif", "a.PNG"]
    odd = folder / 'new\nline "quoted".jpg'
    odd.write_bytes(b"odd")
    raw = os.fsencode(folder) + b"/\xff.jpg"
    with open(raw, "wb") as file:
        file.write(b"raw")
    found = _find("-", stdin=os.fsencode(odd) + b"\0" + raw + b"\0", null=True)
    assert [one.read() for one in found] == [b"odd", b"raw"]
    assert _find("-") == []


def test_what_is_no_file_is_an_error_when_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (pipe,) = _find(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="neither a file nor a folder"):
        pipe.read()
    (missing,) = _find(tmp_path / "missing.jpg")
    with pytest.raises(FileNotFoundError):
        missing.read()
    (zero,) = find_inputs(["a\0b.jpg"], io.BytesIO())
    assert zero.read is not None
    with pytest.raises(OSError, match="null"):
        zero.read()
    (tmp_path / "empty").mkdir()
    (empty,) = _find(tmp_path / "empty")
    assert empty.read is None and empty.error == "holds no image; it is empty"
    (tmp_path / "empty" / "a.txt").write_text("a")
    (other,) = _find(tmp_path / "empty")
    assert other.error == "holds no image; 1 other file was not looked at (.txt 1)"


def test_a_url_is_one_error_that_says_what_to_do():
    (one,) = _find("https://example.org/photo.jpg?size=2")
    assert one.read is None and one.error == "is a URL, expected a file or folder; download it first"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission_are_errors(tmp_path):
    (tmp_path / "a").mkdir(mode=0o000)
    (tmp_path / "b.jpg").write_bytes(b"b")
    found = _find(tmp_path)
    assert [one.error for one in found] == ["", "cannot be read (Permission denied)"]
