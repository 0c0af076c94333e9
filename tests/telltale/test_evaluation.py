"""The Python API's evaluation and shards."""

import json

import pytest

import telltale
from dataio.shards.manifest import read_manifest
from engines.evaluate.predictions import read_predictions
from tests.support import write_detector


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_shards):
    folder = tmp_path_factory.mktemp("run")
    manifest = read_manifest(tiny_shards)
    write_detector(
        folder / "best.pt",
        generators=manifest["generators"],
        objects=manifest["objects"],
        codec=manifest["codec"],
    )
    return folder


def test_evaluate_gives_what_the_command_writes(run, tiny_shards, tmp_path):
    kept = telltale.evaluate(run, tiny_shards, split="val", output=tmp_path / "out", resamples=20)
    assert kept.metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert kept.table.equals(read_predictions(tmp_path / "out" / "predictions.parquet"))
    unkept = telltale.evaluate(run, tiny_shards, split="val", resamples=20)
    assert unkept.metrics == kept.metrics
    frame = unkept.to_dataframe()
    assert len(frame) == read_manifest(tiny_shards)["splits"]["val"]["samples"]
    assert frame["p_fake"].between(0, 1).all()


def test_bad_arguments_are_refused(run, tiny_shards):
    with pytest.raises(telltale.UserError, match="resamples 0: expected 1 or more"):
        telltale.evaluate(run, tiny_shards, resamples=0)
    with pytest.raises(telltale.UserError, match="tset"):
        telltale.evaluate(run, tiny_shards, split="tset")


def test_shards_open_and_images_of_them_predict(run, tiny_shards):
    shards = telltale.open_shards(tiny_shards, "test")
    rows = telltale.load(run).predict(shards.read(number).tobytes() for number in range(3))
    assert len(shards) > 3 and all(row.generator in shards.labels.generators for row in rows)
    with pytest.raises(telltale.UserError, match="no such folder of shards"):
        telltale.open_shards(tiny_shards / "nowhere", "test")
