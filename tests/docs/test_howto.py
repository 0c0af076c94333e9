"""The steps of the how-to pages, carried out as written in a copy of the code."""

import json

import numpy as np

from dataio.shards.shard_set import ShardSet
from engines.evaluate.predictions import build_table, write_predictions
from tests.docs.pages import copy_of_the_code, follow
from tests.random_predictions import random_arrays


def test_a_backbone_is_one_file(tmp_path):
    folder = copy_of_the_code(tmp_path)
    follow("howto/backbone.md", folder)
    log = [json.loads(line) for line in (folder / "runs/tinynet/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in log) == 2
    assert (folder / "runs/tinynet/final.safetensors").stat().st_size < 1_000_000


def test_a_layout_is_one_file(tmp_path):
    folder = copy_of_the_code(tmp_path)
    follow("howto/layout.md", folder)
    manifest = json.loads((folder / "data/by_folder/manifest.json").read_text())
    assert manifest["generators"] == ["nature", "adm", "glide"]
    shards = [ShardSet(folder / "data/by_folder", split) for split in ("train", "val", "test")]
    assert sum(map(len, shards)) == 60 and all(map(len, shards))


def test_a_metric_is_one_file(tmp_path):
    folder = copy_of_the_code(tmp_path)
    table = build_table(random_arrays(300, seed=4))
    evaluation = folder / "runs/quickstart/evaluation"
    evaluation.mkdir(parents=True)
    write_predictions(evaluation / "predictions.parquet", table)
    output = follow("howto/metric.md", folder)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    fake = np.array(table["generator"].to_pylist()) != "nature"
    p_fake = np.array(table["p_fake"])
    wrong = [(p >= 0.9) if not f else (p <= 0.1) for p, f in zip(p_fake, fake, strict=True)]
    assert metrics["overall"]["certain_error"] == np.mean(wrong) > 0
    low, high = metrics["intervals"]["images"]["overall"]["certain_error"]
    assert low < np.mean(wrong) < high
    assert "certain_error" in metrics["per_generator"]["adm"]
    assert "wrong with P >= 0.9" in output
