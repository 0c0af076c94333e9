"""Which files of a folder, a zip or a glob are taken as images: by content; the others are counted."""

import contextlib
import io
import logging
import os
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from dataio.core.log import log
from dataio.images.opening import Undecodable, open_image
from dataio.sources.inputs import find_inputs

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
FORMATS = [
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
    "TIFF",
    "GIF",
    "JPEG2000",
    "ICO",
    "PPM",
    "DDS",
    "PCX",
    "SGI",
    "MPO",
    "QOI",
]
FORMATS += ["AVIF"] if features.check("avif") else []


def coded(kind: str) -> bytes:
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": [PICTURE]} if kind == "MPO" else {}
    PICTURE.save(buffer, kind, **more)
    return buffer.getvalue()


IMAGES = {kind: coded(kind) for kind in FORMATS} | {
    "HEIC": HEIC,
    "JXL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50),
}
OTHERS = {
    "empty": b"",
    "text": b"Title: a list of files\nLines: 2\n\n",
    "BM": b"BMW is a maker of cars, and this is a text about it.",
    "P2": b"P2 is a turbo pump",
    "Python": b"Python is a language",
    "header": b"#define GUARD\n#include <stdio.h>\n",
    "zip": b"PK\x05\x06" + bytes(18),
    "pdf": b"%PDF-1.7\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2",
    "ole": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "hdf": b"\x89HDF\r\n\x1a\n" + bytes(100),
}
CONTENTS = {
    **{name: (data, True) for name, data in IMAGES.items()},
    **{n: (d, False) for n, d in OTHERS.items()},
}
NAMED = (".jpg", ".JPEG", ".png", ".jfif", ".jpe", ".AVIF", ".jp2", ".mpo", ".heic", ".tiff", ".gif")
UNNAMED = ("", ".txt", ".dat", ".ppm", ".ico", ".dds", ".qoi", ".bak", ".part", ".2024", ".csv", ".JSON")


@contextlib.contextmanager
def messages():
    """The log's lines."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def found_in(*paths: object) -> tuple[list[str], list[str], str]:
    """Base names of the images, errors, and the line about the others."""
    with messages() as lines:
        inputs = list(find_inputs(map(str, paths), io.BytesIO()))
    assert len(lines) <= 1
    good = [os.path.basename(one.path) for one in inputs if not one.error]
    return good, [one.error for one in inputs if one.error], "".join(lines)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["a", "b", "sub/c", "sub/deep/d"]), st.sampled_from(NAMED + UNNAMED)),
        st.sampled_from(sorted(CONTENTS)),
        min_size=1,
        max_size=12,
    )
)
def test_folders_zips_and_globs_take_the_same_files_and_count_the_others(files):
    names = {stem + suffix: kind for (stem, suffix), kind in files.items()}
    expected = sorted(
        os.path.basename(name) for name, kind in names.items() if name.endswith(NAMED) or CONTENTS[kind][1]
    )
    with tempfile.TemporaryDirectory() as top, tempfile.TemporaryDirectory() as other:
        with zipfile.ZipFile(Path(other) / "z.zip", "w") as archive:
            for name, kind in names.items():
                path = Path(top) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(CONTENTS[kind][0])
                archive.writestr(name, CONTENTS[kind][0])
        for given_path in (top, f"{other}/z.zip", f"{top}/**/*", f"{top}/**"):
            good, errors, line = found_in(given_path)
            assert sorted(good) == expected
            assert len(errors) == (not expected)
            assert bool(errors) <= (not line)  # each is counted once
            counted = re.search(
                r"(\d+) other files? (?:was|were) not looked at \((.*)\)", line or "".join(errors)
            )
            assert (int(counted[1]) if counted else 0) == len(names) - len(expected)
            if counted:
                assert sum(int(part.split()[-1]) for part in counted[2].split(", ")) == int(counted[1])


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_an_image_without_a_suffix_is_taken(tmp_path, kind):
    (tmp_path / "x").write_bytes(IMAGES[kind])
    assert found_in(tmp_path)[0] == ["x"]


@pytest.mark.parametrize(
    "suffix", [".avif", ".jfif", ".jpe", ".jp2", ".mpo", ".ico", ".tga", ".ppm", ".dds", ".qoi"]
)
def test_formats_by_their_own_suffix_are_taken_and_decoded(tmp_path, suffix):
    Image.init()
    if Image.EXTENSION[suffix] == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / f"x{suffix}").write_bytes(coded(Image.EXTENSION[suffix]))
    (one,) = find_inputs([str(tmp_path)], io.BytesIO())
    assert one.read is not None and min(open_image(one.read()).size) >= 18  # an icon is made square


def test_the_line_names_suffixes_hidden_files_and_files_without_a_suffix(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("text")
    for name in (
        "a.csv",
        "b.CSV",
        "LICENSE",
        "photo.dng",
        "Thumbs.db",
        ".DS_Store",
        ".x.jpg",
        "notes.2 of 3",
    ):
        (tmp_path / name).write_bytes(b"II*\0" if name == "photo.dng" else b"text")
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jpg").write_bytes(b"")
    good, errors, line = found_in(tmp_path)
    assert (good, errors) == (["a.jpg"], [])
    assert line == (
        "40 other files were not looked at "
        "(.txt 30, hidden 3, .csv 2, none 2, .dng 1, hidden folder 1, no plain file 1)"
    )


def test_several_paths_have_one_line_and_single_files_none(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(IMAGES["PNG"])
        (tmp_path / folder / "x.txt").write_text("text")
    assert found_in(tmp_path / "a", tmp_path / "b") == (
        ["x.png"] * 2,
        [],
        "2 other files were not looked at (.txt 2)",
    )
    assert found_in(tmp_path / "a" / "x.txt") == (["x.txt"], [], "")


def test_zips_in_folders_and_in_zips_are_named(tmp_path):
    (tmp_path / "f").mkdir()
    with zipfile.ZipFile(tmp_path / "f" / "inner.zip", "w") as archive:
        archive.writestr("a.png", IMAGES["PNG"])
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(tmp_path / "f" / "inner.zip", "inner.zip")
    for path in (tmp_path / "f", tmp_path / "outer.zip"):
        _, errors, line = found_in(path)
        assert not line and errors == [
            "holds no image; 1 other file was not looked at (.zip 1); "
            "an archive in a folder is not opened, give it by its own path"
        ]
    assert found_in(tmp_path / "f" / "*.zip")[0] == ["a.png"]


def test_encrypted_members_are_rows_or_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.png", "b.txt"):
            archive.writestr(name, IMAGES["PNG"])
    data = bytearray((tmp_path / "a.zip").read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of each header: APPNOTE 4.4.4
        for match in re.finditer(re.escape(mark), bytes(data)):
            data[match.start() + place] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with messages() as lines:
        (one,) = find_inputs([str(tmp_path / "a.zip")], io.BytesIO())
    with pytest.raises(OSError, match="encrypted"):
        one.read()  # type: ignore[misc]
    assert lines == ["1 other file was not looked at (encrypted 1)"]


def test_links_that_lead_nowhere_are_rows_that_name_them(tmp_path):
    (tmp_path / "gone").symlink_to("nowhere.jpg")
    (tmp_path / "self").symlink_to("self")
    gone, own = find_inputs([str(tmp_path)], io.BytesIO())
    with pytest.raises(OSError, match=r"a link to nowhere\.jpg: No such file"):
        gone.read()  # type: ignore[misc]
    with pytest.raises(OSError, match="a link to self: Too many levels"):
        own.read()  # type: ignore[misc]


def test_heic_says_what_is_needed():
    if "HEIF" in Image.OPEN:
        pytest.skip("pillow-heif is installed")
    with pytest.raises(Undecodable, match=r"HEIC, which Pillow opens only with pillow-heif"):
        open_image(HEIC)
    with pytest.raises(Undecodable, match="JPEG XL"):
        open_image(IMAGES["JXL"])
