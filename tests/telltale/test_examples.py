"""The API's examples, in its docstrings, in the README and in the documentation, run as written."""

import doctest
import importlib
import re

import numpy as np
import pytest
from PIL import Image

from dataio.shards.manifest import read_manifest
from tests.support import write_detector


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_shards):
    """A folder with what the examples name: a run, its shards, and two pictures."""
    folder = tmp_path_factory.mktemp("work")
    manifest = read_manifest(tiny_shards)
    labels = {"generators": manifest["generators"], "objects": manifest["objects"]}
    for name in ("runs/quickstart", "RUN"):
        (folder / name).mkdir(parents=True)
        write_detector(folder / name / "best.pt", **labels, codec=manifest["codec"])
    (folder / "data").mkdir()
    (folder / "data" / "quickstart").symlink_to(tiny_shards)
    for name in ("photo.jpg", "other.png"):
        Image.fromarray(np.full((48, 64, 3), 99, np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    "name", ["telltale.detector", "telltale.evaluation", "telltale.pipelines", "telltale.results"]
)
def test_docstrings(name, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted >= 3 and result.failed == 0


PRINTED = {
    "README.md": "photo.jpg",
    "docs/getting-started.md": "photo.jpg",
    "docs/predict.md": "photo.jpg",
    "docs/data.md": "torch.Size([16, 3, 224, 224]) torch.Size([16])",
}


@pytest.mark.parametrize("page", PRINTED)
def test_pages(page, workplace, repo_root, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    text = (repo_root / page).read_text()
    programs = [
        code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "telltale" in code
    ]
    assert programs
    for program in programs:
        exec(compile(program, page, "exec"), {})
    assert PRINTED[page] in capsys.readouterr().out
