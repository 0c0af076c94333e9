"""The wheel, installed into a folder of its own, runs commands and the API from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import environment, flags

PACKAGES = ("dataio", "models", "engines", "launch", "telltale")


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory):
    """Built from a copy, so that the checkout gets no build folder; needs no network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repo_root / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", str(source)]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(target)]
    subprocess.run([*pip, *options], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", str(wheel)]
    subprocess.run([*pip, "--no-deps", "--no-index", "-q", "--target", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a program in an empty folder, with the installed packages before all others."""
    folder = tmp_path_factory.mktemp("empty")

    def call(*words: str, code: int = 0) -> str:
        env = {**environment(), "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "2"}
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    call.folder = folder  # type: ignore[attr-defined]
    return call


def test_it_holds_every_file_of_the_packages(repo_root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for name in PACKAGES for path in (repo_root / name).rglob("*") if path.is_file()]
    files += [path for path in (repo_root / "telltale" / "configs").rglob("*") if path.is_file()]
    expected = {str(path.relative_to(repo_root)) for path in files if "__pycache__" not in path.parts}
    assert len(expected) > 200 and expected - names == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_and_api_run_without_the_repository(run, installed):
    command = str(installed / "bin" / "telltale")
    for words in ([command], [sys.executable, "-m", "telltale"]):
        assert "train" in run(*words, "--help")
    run(command, "shard", "--layout", "synthetic", "--source", "source", "--output", "shards",
        "--synthetic.images", "120", "--synthetic.size", "32", "--codec.size", "32")  # fmt: skip
    tiny = flags(data__shards="shards", train__epochs=0.2, run__dir="run", train__threads=1)
    run(command, "train", "--processes", "2", "--config", "configs/quickstart.yaml", *tiny)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(run.folder / "a.png")
    run(command, "predict", "--checkpoint", "run", "--output", "rows.jsonl", "a.png")
    row = json.loads((run.folder / "rows.jsonl").read_text())
    program = (
        "import sys, json, telltale; detector = telltale.load('run'); row = detector.predict('a.png')[0]; "
        "heat = detector.explain('a.png').heat; result = telltale.evaluate('run', 'shards', resamples=10); "
        "names = [n for n in sys.modules if n.partition('.')[0] in sys.argv[1].split()]; "
        "print(json.dumps([row.p_fake, row.verdict, list(heat.shape), len(result.table), "
        "sorted({sys.modules[n].__file__ for n in names})]))"
    )
    output = run(sys.executable, "-c", program, " ".join(PACKAGES))
    p_fake, verdict, shape, images, files = json.loads(output.splitlines()[-1])
    assert (p_fake, verdict) == (pytest.approx(row["p_fake"], abs=1e-6), row["verdict"])
    assert shape == [24, 24] and images > 5
    # Not an editable install of the repository, which the environment of the tests may have.
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []


def test_configurations_are_found_and_other_files_are_not(run, installed):
    assert os.listdir(installed / "telltale" / "configs" / "deepspeed")
    lines = run(
        str(installed / "bin" / "telltale"), "train", "--config", "configs/nowhere.yaml", code=2
    ).splitlines()
    assert len(lines) == 1 and "configs/nowhere.yaml" in lines[0] and "no such file" in lines[0]
    program = (
        "from engines.config.detector import parse_config; from engines.mlm.deepspeed_config import read_deepspeed; "
        "from engines.runtime.paths import CONFIGS; "
        "parse_config(['--config', 'configs/resnet50_genimage.yaml'], CONFIGS / 'quickstart.yaml'); "
        "read_deepspeed('configs/deepspeed/zero2.json'); print(CONFIGS)"
    )
    assert run(sys.executable, "-c", program).strip() == str(installed / "telltale" / "configs")
