"""Hints about paths that name no file."""

import os
import re
import unicodedata
import zipfile

import pytest

from dataio.sources.near_paths import hint_for
from dataio.sources.source import Source

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("there", "path", "hint"),
    [
        ("Img/A.JPG", "img/a.jpg", "'Img/A.JPG' there: upper and lower case must be the same"),
        (f"{NFD}/a.jpg", f"{NFC}/a.jpg", "form NFC, the file NFD; they must be the same"),
        (f"{NFC}/a.jpg", f"{NFD}/a.jpg", "form NFD, the file NFC; they must be the same"),
        ("img/a.jpg", "img\\a.jpg", "'img/a.jpg' there: folders are separated by '/'"),
        ("img/a.jpg", "C:\\data\\root\\img\\a.jpg", "folders are separated by '/'"),
        ("img/a.jpg", "{root}\\img\\a.jpg", "'img/a.jpg' there: folders are separated by '/'"),
        ("img/a.jpg", "{root}/img/a.jpg", "'img/a.jpg' there: paths are below the root"),
        ("img/a.jpg", "root/img/a.jpg", "'img/a.jpg' there: paths are below the root"),
        ("img/a.jpg", "data/img/a.jpg", "'img/a.jpg' there: paths are below the root"),
        ("img/a b.jpg", "file://{root}/img/a%20b.jpg", "'img/a b.jpg' there: .*without file://"),
        ("img/a.jpg", "file:///elsewhere/a.jpg", "below the root, without file://"),
        ("img/a.jpg", "FILE://localhost{root}/img/A.jpg", "without file:// and upper and lower case"),
        ("img/a b.jpg", "img/a%20b.jpg", "'img/a b.jpg' there: codes with % are not decoded"),
        ("img/a.jpg", "img/a\u200b.jpg", "white space or an invisible character differs"),
        ("img/a.jpg", "img/a .jpg", "white space or an invisible character differs"),
        ("img/a.png", "img/a.jpg", "'img/a.png' there: the suffix differs"),
        ("img/a.jpg", "https://x.org/a.jpg", "is an address, .*download it"),
        ("img/a.jpg", "img/b.jpg", "^$"),
        ("img/a.jpg", "nowhere/else/b.jpg", "^$"),
        ("caf\udce9.jpg", "café.jpg", "the file's name is not UTF-8"),
        ("café.jpg", "caf\udce9.jpg", "the list is not UTF-8"),
        ("img/a.jpg", "caf\udce9.jpg", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_hints_name_the_file_and_the_difference(tmp_path, there, path, hint, zipped):
    root = tmp_path / "root"
    if zipped:
        if "\udce9" in there or "{root}" in path:
            pytest.skip("a zip's names are text, and its root is a file")
        root = tmp_path / "root"
        with zipfile.ZipFile(root, "w") as archive:
            archive.writestr(there, b"x")
    else:
        (root / there).parent.mkdir(parents=True)
        (root / there).write_bytes(b"x")
    path = path.replace("{root}", os.fspath(root))
    assert re.search(hint, hint_for(Source(root), path)), hint_for(Source(root), path)
