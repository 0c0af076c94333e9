"""launch/evaluate.py on real shards and a network of random weights, by one and by three processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image

from dataio.loading.loader import Loader
from dataio.loading.training_order import evaluation_specs
from dataio.sharding.quickstart import make_synthetic_shards
from dataio.shards.manifest import read_manifest
from dataio.shards.shard_set import ShardSet
from engines.checkpoint import files as checkpoints
from engines.checkpoint.load_model import load_model
from engines.config.detector import from_dict
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.predictions import probabilities, read_predictions
from launch.evaluate import main as evaluate
from models.detector.dual_head import DualHead
from tests.wandb_file import read_wandb_file

IMAGES = 70


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards in data/ and a checkpoint, best.pt, of their label spaces."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_synthetic_shards(folder / "data", images=IMAGES, size=32, seed=0)
    manifest = read_manifest(folder / "data")
    _write_checkpoint(folder / "best.pt", manifest, manifest["generators"])
    _write_checkpoint(folder / "other.pt", manifest, ["nature", "adm"])
    return folder


def _write_checkpoint(path: Path, manifest: dict, generators: list[str]) -> None:
    config = {"data": {"size": 32, "eval_crop": 1.0}, "model": {"backbone": "resnet18", "stem": "cifar"}}
    torch.manual_seed(0)
    model = DualHead(from_dict(config).model, generators, manifest["objects"])
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 5,
        "model": checkpoints.cpu_state(model),
        "labels": {"generators": list(generators), "objects": manifest["objects"]},
        "codec": manifest["codec"],
        "layout": manifest["layout"],
        "config": config,
    }
    checkpoints.save(path, state)


def _evaluate(root: Path, work: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = [*start, str(root / "launch" / "evaluate.py"), "--data", "data", *flags]
    # Bits depend on the number of threads, which torchrun would set to 1 for several processes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_every_image_once_by_any_number_of_processes(work: Path, repo_root: Path) -> None:
    entry = read_manifest(work / "data")["splits"]["train"]
    count = entry["samples"]
    tables = []
    # Neither number of processes nor batch size divides the split.
    for processes, batch in ((1, 9), (3, 5)):
        assert count % batch and (processes == 1 or count % processes)
        flags = ["--checkpoint", "best.pt", "--split", "train", "--output", f"out{processes}"]
        done = _evaluate(repo_root, work, *flags, "--batch", str(batch), "--verify", processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"{count} images" in done.stdout and f"out{processes}/metrics.json" in done.stdout
        folder = work / f"out{processes}"
        assert sorted(file.name for file in folder.iterdir()) == ["metrics.json", "predictions.parquet"]
        table = read_predictions(folder / "predictions.parquet")
        assert table["sample_id"].to_pylist() == list(range(count))
        assert json.loads((folder / "metrics.json").read_text()) == compute_metrics(table)
        tables.append(table)
    one, three = tables
    for column in ("key", "generator", "object"):
        assert one[column].equals(three[column])
    np.testing.assert_allclose(probabilities(one), probabilities(three), atol=1e-5)
    names, counts = np.unique(one["generator"].to_pylist(), return_counts=True)
    expected = {name: n for name, n in entry["generators"].items() if n}
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == expected


def test_an_evaluation_goes_to_weights_and_biases_where_asked(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(work / "staged"))
    run, output = work / "a.run", work / "a.run" / "evaluation"
    run.mkdir()
    shutil.copy(work / "best.pt", run)
    (run / "config.yaml").write_text("log: {project: detectors, group: family}\n")
    words = [
        "--checkpoint",
        str(run / "best.pt"),
        "--data",
        str(work / "data"),
        "--split",
        "val",
        "--resamples",
        "5",
    ]
    for mode in ("offline", "offline", "auto"):  # without an account auto sends nothing
        assert evaluate([*words, "--output", str(output), "--pictures", "1", "--wandb", mode]) == 0
    wandb.teardown()
    metrics = json.loads((output / "metrics.json").read_text())
    first, second = (read_wandb_file(path) for path in sorted(output.glob("wandb/offline-*/*.wandb")))
    assert first.run.run_id == second.run.run_id and not second.run.resume  # the second replaces the first
    assert (first.run.project, first.run.run_group, first.run.job_type) == (
        "detectors",
        "family",
        "evaluation",
    )
    assert first.run.display_name == "a.run evaluation" and first.config["split"] == "val"
    assert first.summary["overall/generator_error"] == pytest.approx(metrics["overall"]["generator_error"])
    assert [row[0] for row in first.table("generators")[1]] == list(metrics["per_generator"])
    columns, rows, files = first.table("pictures")
    assert columns[:3] == ["picture", "key", "generator"] and len(rows) == 3
    for row in rows:
        with Image.open(files[row[0]["path"]]) as picture:
            assert picture.size == (32, 32)


@pytest.mark.slow
def test_held_out_generators_and_resamples_reach_the_metrics(work: Path, repo_root: Path) -> None:
    flags = ["--checkpoint", "best.pt", "--split", "train", "--output", "held"]
    done = _evaluate(repo_root, work, *flags, "--held-out", "adm,glide", "--resamples", "20")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((work / "held" / "metrics.json").read_text())
    assert metrics["open_set"]["held_out"] == ["adm", "glide"]
    assert metrics["intervals"]["resamples"] == 20
    assert "never seen: adm, glide" in done.stdout


@pytest.mark.slow
def test_an_export_predicts_what_its_checkpoint_does_bit_for_bit(work: Path, repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "launch" / "export.py"), "--checkpoint", "best.pt"]
    done = subprocess.run([*command, "--output", "exported"], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (work / "exported").iterdir()) == ["config.json", "model.safetensors"]
    tables = []
    for checkpoint in ("best.pt", "exported"):
        flags = ["--checkpoint", checkpoint, "--split", "val", "--output", f"out_{checkpoint}"]
        done = _evaluate(repo_root, work, *flags)
        assert done.returncode == 0, done.stderr
        tables.append(read_predictions(work / f"out_{checkpoint}" / "predictions.parquet"))
    assert np.array_equal(probabilities(tables[0]), probabilities(tables[1]))
    assert len(tables[0]) > 0


@pytest.mark.slow
def test_mirror_is_the_mean_over_an_image_and_its_mirror_image(work: Path, repo_root: Path) -> None:
    flags = ["--checkpoint", "best.pt", "--split", "val", "--output", "mirrored", "--mirror"]
    done = _evaluate(repo_root, work, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((work / "mirrored" / "metrics.json").read_text())["checkpoint"]["mirror"] is True
    table = read_predictions(work / "mirrored" / "predictions.parquet")

    model, config, _ = load_model(work / "best.pt")
    shards = ShardSet(work / "data", "val")
    views = evaluation_specs(shards, config.data, batch=len(shards.rows), rank=0, world=1)
    loader = Loader(
        shards, config.data, views, batch=len(shards.rows), device=torch.device("cpu"), train=False
    )
    with torch.no_grad():
        image = next(iter(loader)).image
        there, mirrored = (
            [head.double().softmax(1) for head in model(view)] for view in (image, image.flip(-1))
        )
    assert not torch.allclose(there[0], mirrored[0], atol=1e-4)
    np.testing.assert_allclose(probabilities(table), ((there[0] + mirrored[0]) / 2).numpy(), atol=1e-5)
    likeliest = [shards.labels.objects[int(n)] for n in (there[1] + mirrored[1]).argmax(1)]
    assert table["object_pred"].to_pylist() == likeliest


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "missing.pt", "--split", "test"], ["missing.pt"]),
        (["--checkpoint", "best.pt", "--split", "test", "--held-out", "adm,dalle"], ["'dalle'", "adm, "]),
        (["--checkpoint", "best.pt", "--split", "test", "--resamples", "0"], ["--resamples is 0"]),
        (["--checkpoint", "best.pt", "--split", "tset"], ["'tset'", "train, val, test"]),
        (["--checkpoint", "other.pt", "--split", "test"], ["label space of generators", "[nature, adm]"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(work: Path, repo_root: Path, flags, words) -> None:
    before = sorted(work.iterdir())
    done = _evaluate(repo_root, work, *flags, "--output", "bad")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert sorted(work.iterdir()) == before


def test_unwritable_output_under_torchrun_ends_at_once(work: Path, repo_root: Path) -> None:
    flags = ["--checkpoint", "best.pt", "--split", "test", "--output", "best.pt/evaluation"]
    done = _evaluate(repo_root, work, *flags, processes=2)
    # torchrun turns the code into 1 and adds a report of its own.
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--output best.pt/evaluation: cannot be written" in errors[0]
