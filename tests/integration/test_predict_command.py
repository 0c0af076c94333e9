"""launch/predict.py and launch/calibrate.py on a network of random weights and files of every kind."""

import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dataio.images.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.job import write_shards
from dataio.shards.manifest import read_manifest
from engines.evaluate.calibrate import calibrate_checkpoint
from engines.evaluate.calibration import load_calibration
from engines.evaluate.evaluate import evaluate_checkpoint
from engines.evaluate.predictions import build_table, read_predictions
from engines.evaluate.split_inference import load_model, predict_split
from engines.runtime.command import run_command
from tests.support import environment, write_detector

NAMED = ["path", "verdict", "p_fake", "generator", "p_generator", "object", "error"]
# Of probabilities between one batch and another: float32 sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["default", pytest.param("keep", marks=pytest.mark.slow)])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Originals in source/, their shards in data/, and a run of random weights of that codec."""
    folder = tmp_path_factory.mktemp(request.param)
    write_synthetic(folder / "source", images=110, size=40, seed=2)
    layout = GenImageLayout(folder / "source", val_fraction=0.3)
    policy = preset_policy(request.param, 32 if request.param == "default" else None)
    write_shards(layout, folder / "data", policy, samples_per_shard=20, quiet=True)
    manifest = read_manifest(folder / "data")
    (folder / "run").mkdir()
    write_detector(
        folder / "run" / "best.pt",
        generators=manifest["generators"],
        objects=manifest["objects"],
        codec=manifest["codec"],
        size=24,
    )
    return folder


def _run(root: Path, folder: Path, command: str, *flags: object) -> subprocess.CompletedProcess:
    words = [sys.executable, str(root / "launch" / f"{command}.py"), *map(str, flags)]
    return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Call a command in this process, as `python launch/COMMAND.py` would, but sooner."""

    def run(folder: Path, command: str, *flags: object, stdin: bytes = b"") -> SimpleNamespace:
        monkeypatch.setattr(sys, "path", list(sys.path))  # launch files change its first entry
        main = importlib.import_module(f"launch.{command}").main
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            run_command(lambda: main([str(flag) for flag in flags]))
        return SimpleNamespace(returncode=end.value.code, stdout=out.getvalue(), stderr=err.getvalue())

    return run


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def _sources(data: Path, split: str) -> list[str]:
    """The original of each sample, in the order of the sample ids."""
    from tarfile import open as open_tar

    found = []
    for path in sorted((data / split).glob("*.tar")):
        with open_tar(path) as tar:
            members = [m for m in tar.getmembers() if m.name.endswith(".json")]
            found += [json.load(tar.extractfile(m))["source"] for m in members]  # type: ignore[arg-type]
    return found


def test_predictions_are_evaluations_on_the_same_images_raw_and_calibrated(
    work: Path, repo_root: Path, call
) -> None:
    sources = [f"source/{path}" for path in _sources(work / "data", "val")]
    assert len(sources) > 10
    table = build_table(predict_split(str(work / "run"), str(work / "data"), "val"))  # type: ignore[arg-type]
    flags = ("--checkpoint", "run", "--batch", "7", *sources)

    done = _run(repo_root, work, "predict", *flags, "--output", "raw.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not calibrated") == 1
    rows = _rows(work / "raw.jsonl")
    assert [row["path"] for row in rows] == sources
    raw = table["p_fake"].to_numpy()
    assert np.ptp(raw) > 0.05, "the detector tells images apart"
    np.testing.assert_allclose([row["p_fake"] for row in rows], raw, atol=TOLERANCE)
    assert [row["verdict"] for row in rows] == ["AI-generated" if p >= 0.5 else "real" for p in raw]
    assert [row["generator"] for row in rows] == table["generator_pred"].to_pylist()
    assert [row["object"] for row in rows] == table["object_pred"].to_pylist()
    likeliest = [table[f"p_{row['generator']}"][n].as_py() for n, row in enumerate(rows)]
    np.testing.assert_allclose([row["p_generator"] for row in rows], likeliest, atol=TOLERANCE)

    done = _run(
        repo_root, work, "calibrate", "--checkpoint", "run", "--data", "data", "--false-alarm-rate", "0.2"
    )
    assert done.returncode == 0, done.stderr
    assert "calibration: run/best.calibration.json" in done.stdout
    found = load_calibration(work / "run" / "best.pt", load_model(work / "run")[0].state_dict())
    assert (
        found is not None and found.split == "val" and found.counts["real"] + found.counts["fake"] == len(raw)
    )
    done = call(work, "predict", *flags, "--output", "calibrated.csv")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = _rows(work / "calibrated.csv")
    assert list(rows[0])[:7] == NAMED
    p = [float(row["p_fake"]) for row in rows]
    np.testing.assert_allclose(p, found.probability(raw), atol=TOLERANCE)
    assert [row["verdict"] for row in rows] == [found.verdict(one) for one in p]
    assert {row["calibrated"] for row in rows} == {"true"}

    # The table of predictions has raw probabilities and says how to calibrate them.
    evaluate_checkpoint(
        checkpoint=str(work / "run"), data=str(work / "data"), split="val", output=str(work / "out")
    )
    info = json.loads((work / "out" / "metrics.json").read_text())["checkpoint"]
    assert info["calibration"] == found.summary() and set(info["calibration"]) == {
        *("temperature", "shift", "threshold", "unsure", "false_alarm_rate")
    }
    np.testing.assert_allclose(
        read_predictions(work / "out" / "predictions.parquet")["p_fake"], raw, atol=TOLERANCE
    )
    (work / "run" / "best.calibration.json").unlink()


def _picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (48, 40), **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _bomb(side: int) -> bytes:
    """A PNG of one bit per pixel, all black."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((side + 7) // 8 + 1) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 30).save(buffer, "PNG")
    return buffer.getvalue()


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (48, 40), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _odd_files(folder: Path) -> dict[str, str]:
    """Write good and bad files; returns what each one's error begins with, "" for good ones."""
    files: dict[str, tuple[bytes, str]] = {
        "good.jpg": (_picture("JPEG"), ""),
        'new\nline "quoted", comma.png': (_picture("PNG"), ""),
        "cr\rname.png": (_picture("PNG"), ""),
        "cmyk.jpg": (_picture("JPEG", "CMYK"), ""),
        "grey.jpg": (_picture("JPEG", "L"), ""),
        "sixteen.png": (_sixteen_bits(), ""),
        "animated.gif": (_animated("GIF"), ""),
        "animated.webp": (_animated("WEBP"), ""),
        "one-pixel.png": (_picture("PNG", size=(1, 1)), ""),
        "zero.jpg": (b"", "not a readable image (zero bytes)"),
        "zeros.jpg": (bytes(500), "not a readable image (nothing but zero bytes)"),
        "truncated.jpg": (_picture("JPEG")[:700], "not a readable image ("),
        "truncated.png": (_picture("PNG")[:900], "not a readable image ("),
        "text.jpg": (b"not an image at all\n", "not a readable image (not an image Pillow knows)"),
        "bomb.png": (_bomb(20_000), "not a readable image (400 megapixels, more than the limit of 200"),
        "bomb2.png": (_bomb(15_000), "not a readable image (225 megapixels, more than the limit"),
        "line.png": (
            _picture("PNG", size=(60_000, 1)),
            "not a readable image (60000 x 1 pixels are too long",
        ),
    }
    folder.mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: error for name, (_, error) in files.items()}


def test_bad_files_have_their_errors_and_stop_nothing(work: Path, call, tmp_path: Path) -> None:
    kept = work.name.startswith("keep")
    expected = _odd_files(tmp_path / "odd")
    if kept:  # nothing is resized
        expected["line.png"] = ""
    (tmp_path / "odd" / "loop").symlink_to(tmp_path)
    (tmp_path / "odd" / "secret.jpg").write_bytes(_picture("JPEG"))
    (tmp_path / "odd" / "secret.jpg").chmod(0)
    expected["secret.jpg"] = "" if os.geteuid() == 0 else "cannot be read (Permission denied)"
    with open(os.fsencode(tmp_path / "odd") + b"/latin\xe9.png", "wb") as odd:
        odd.write(_picture("PNG"))
    expected[os.fsdecode(b"latin\xe9.png")] = ""
    (tmp_path / "empty").mkdir()
    for name in ("out.csv", "out.jsonl"):
        # Small batches, so that bad files fall into the middle of several.
        words = [
            "--checkpoint",
            work / "run",
            "--batch",
            "4",
            "--output",
            name,
            "odd",
            "missing.jpg",
            "empty",
        ]
        done = call(tmp_path, "predict", *words)
        assert done.returncode == 0, done.stderr
        calibration, others = done.stderr.splitlines()
        assert calibration.startswith("not calibrated") and "not looked at" in others
        rows = {row["path"]: row for row in _rows(tmp_path / name)}
        assert set(rows) == {f"odd/{name}" for name in expected} | {"missing.jpg", "empty"}
        for file, error in expected.items():
            row = rows[f"odd/{file}"]
            found = row["error"] or ""
            assert found.startswith(error) and bool(found) == bool(error), (file, found)
            assert bool(row["verdict"]) == (not error) and bool(row["p_fake"]) == (not error)
        assert rows["missing.jpg"]["error"] == "cannot be read (No such file or directory)"
        assert rows["empty"]["error"].startswith("holds no image")


def test_a_zip_a_list_and_a_folder_say_the_same(work: Path, call, tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for number in range(6):
        picture = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "photos" / ("sub" if number % 2 else "") / f"{number}.png")
    files = sorted(p.relative_to(tmp_path) for p in (tmp_path / "photos").rglob("*.png"))
    (tmp_path / "photos" / "sub" / "note.txt").touch()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in files:
            archive.write(tmp_path / path, path.relative_to("photos"))
    listed = "\0".join(map(str, files)).encode()
    answers = {}
    paths: dict[str, list[str]] = {
        "folder": ["photos"],
        "zip": ["photos.zip"],
        "list": ["--null", "-"],
        "glob": ["photos/**/*.png"],
    }
    for what, given in paths.items():
        words = ["--checkpoint", work / "run" / "best.pt", "--output", "out.jsonl", *given]
        done = call(tmp_path, "predict", *words, stdin=listed)
        assert done.returncode == 0, done.stderr
        assert "6 images: " in done.stdout and "0 unreadable" in done.stdout
        others = "warning: 1 other file was not looked at (.txt 1)\n"
        assert (others in done.stderr) == (what == "folder")
        rows = _rows(tmp_path / "out.jsonl")
        answers[what] = {row["path"].replace(".zip", ""): row["p_fake"] for row in rows}
    assert set(answers["folder"]) == set(map(str, files))
    for other in answers.values():
        assert other == pytest.approx(answers["folder"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["-"], 2, "no images"),
        (["missing.jpg"], 2, "no image could be read; first missing.jpg: cannot be read"),
        (["cut.zip"], 2, "cut.zip: is a zip file that ends early (16 bytes)"),
        (["texts"], 2, "texts: holds no image; 1 other file was not looked at (.txt 1)"),
        (["good.jpg", "--output", "x.txt"], 2, "ends in .csv or .jsonl"),
        (["good.jpg", "--output", "none/x.csv"], 2, "there is no folder none"),
        (["good.jpg", "--batch", "0"], 2, "--batch is 0"),
        (["good.jpg", "--explain", "good.jpg"], 2, "--explain good.jpg: cannot be written"),
    ],
)
@pytest.mark.parametrize("work", ["default"], indirect=True)
def test_runs_that_read_nothing_are_one_line(work, call, tmp_path, flags, code, words) -> None:
    (tmp_path / "good.jpg").write_bytes(_picture("JPEG"))
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    output = [] if "--output" in flags else ["--output", "out.csv"]
    done = call(tmp_path, "predict", "--checkpoint", work / "run", *flags, *output)
    assert done.returncode == code
    lines = [line for line in done.stderr.splitlines() if not line.startswith("not calibrated")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    written = {"out.csv"} if any(word in words for word in ("first", "cut", "holds")) else set()
    left = {"good.jpg", "cut.zip", "texts"} | written
    assert {file.name for file in tmp_path.iterdir()} == left


@pytest.mark.parametrize("work", ["default"], indirect=True)
def test_the_table_on_the_screen_and_maps(work: Path, call, tmp_path: Path) -> None:
    (tmp_path / "esc\x1b[31m.jpg").write_bytes(_picture("JPEG"))
    words = ["--checkpoint", work / "run", "--explain", "maps", "esc\x1b[31m.jpg", "none.jpg"]
    done = call(tmp_path, "predict", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].split() == ["verdict", "P(fake)", "likeliest", "generator", "path"]
    assert "esc\\x1b[31m.jpg" in lines[1] and "\x1b" not in done.stdout
    assert lines[2].startswith("-") and lines[2].endswith(
        "none.jpg: cannot be read (No such file or directory)"
    )
    names = sorted(file.name for file in (tmp_path / "maps").iterdir())
    assert names == [f"000001-esc_31m-{part}.png" for part in ("map", "original", "overlay")]
    heat, picture, both = (np.asarray(Image.open(tmp_path / "maps" / name)) for name in names)
    assert heat.shape == (24, 24) and picture.shape == both.shape == (24, 24, 3)
    assert heat.dtype == np.uint8 and np.ptp(heat) > 0 and not np.array_equal(picture, both)


@pytest.mark.parametrize("work", ["default"], indirect=True)
def test_explain_uses_the_calibration(work: Path, call, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_picture("PNG"))
    shutil.copytree(work / "run", tmp_path / "run")
    flags = ["--checkpoint", tmp_path / "run" / "best.pt", "a.png"]
    raw = call(tmp_path, "explain", *flags)
    assert raw.returncode == 0 and "(not calibrated)" in raw.stdout, raw.stderr
    call(tmp_path, "explain", *flags, "--output", "raw.json")
    before = json.loads((tmp_path / "raw.json").read_text())[0]["p_fake"]
    calibrate_checkpoint(checkpoint=str(tmp_path / "run"), data=str(work / "data"))
    found = load_calibration(tmp_path / "run", load_model(tmp_path / "run")[0].state_dict())
    assert found is not None
    for name in ("a.json", "a.html"):
        assert call(tmp_path, "explain", *flags, "--output", name).returncode == 0
    (one,) = json.loads((tmp_path / "a.json").read_text())
    assert one["calibrated"] and one["p_fake"] == pytest.approx(
        float(found.probability(before)), abs=TOLERANCE
    )
    assert {"Real": "real", "Fake": "AI-generated", "Unsure": "unsure"}[one["verdict"]] == found.verdict(
        one["p_fake"]
    )
    assert "not calibrated" not in (tmp_path / "a.html").read_text()
