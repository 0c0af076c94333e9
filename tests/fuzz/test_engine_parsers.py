"""Whatever lies in a file, a parser reads it or raises a UserError of one line: nothing else, and no hang."""

import math

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dataio.loading.quarantine import Quarantine
from dataio.shards.shard_set import ShardSet
from engines.audit.gate import audit_line
from engines.checkpoint import files as checkpoints
from engines.config.detector import parse_config
from engines.config.mlm import FinetuneConfig
from engines.config.parser import parse_as
from engines.evaluate.calibration import load_calibration
from engines.experiments.grid import read_grid
from tests.fuzz.almost import LONG, dump, grafted, mutated, parsed_or_told

YAML = b"""
run: {dir: x, seed: 1}
data:
  shards: y
  scale: [0.2, 1.0]
  mean: [0.1, 0.2, 0.3]
model: {backbone: resnet18}
optim:
  lr: 0.1
"""
TREE = yaml.safe_load(YAML)


def dump_yaml(tree):
    return yaml.safe_dump(tree).encode("utf-8", "replace")


def parse_finetune(argv, file):
    return parse_as(FinetuneConfig, argv, file)


@pytest.mark.parametrize("read", [parse_config, parse_finetune])
def test_configuration(tmp_path, read):
    @settings(max_examples=1000 if LONG else 12)
    @given(grafted(TREE).map(dump_yaml) | mutated(YAML))
    @example(b"&a [*a, *a]")
    @example(b"a: &a {b: *a}")
    @example(b"- 1")
    @example(b"model: {backbone: null}")
    @example(b"data: {scale: null}")
    @example(b"\0")
    def run(data):
        (tmp_path / "x.yaml").write_bytes(data)
        with parsed_or_told():
            read([], tmp_path / "x.yaml")

    run()


def test_sweep(tmp_path):
    good = b"method: grid\nparameters:\n  optim.lr: {values: [0.1, 0.2]}\n  run.seed: {value: 3}\n"

    @given(
        grafted(yaml.safe_load(good)).map(yaml.safe_dump).map(lambda t: t.encode("utf-8", "replace"))
        | mutated(good)
    )
    @example(b"&a [*a]")
    @example(b"method: grid\nparameters: {1: {values: [1, 2]}, [a]: {value: 3}}\n")
    def run(data):
        (tmp_path / "x.yaml").write_bytes(data)
        with parsed_or_told():
            read_grid(tmp_path / "x.yaml")

    run()


def test_checkpoint(tmp_path):
    state = {"format": checkpoints.FORMAT, "version": 1, "model": {"w": torch.arange(6.0)}, "step": 3}
    checkpoints.save(tmp_path / "good.pt", state)
    good = (tmp_path / "good.pt").read_bytes()

    @given(mutated(good))
    def run(data):
        (tmp_path / "x.pt").write_bytes(data)
        with parsed_or_told():
            checkpoints.load(tmp_path / "x.pt")

    run()


def test_checkpoint_contents(tmp_path):
    good = {"format": checkpoints.FORMAT, "version": 1, "model": {"w": 1.0}, "labels": {}, "config": {}}

    @given(grafted(good))
    def run(tree):
        torch.save(tree, tmp_path / "x.pt")
        with parsed_or_told():
            checkpoints.load(tmp_path / "x.pt")

    run()


def test_safetensors(tmp_path):
    metadata = {"format": '"x"', "version": "1", "labels": "{}", "config": "{}", "step": "3"}
    save_file({"w": torch.arange(6.0)}, tmp_path / "good.safetensors", metadata=metadata)
    good = (tmp_path / "good.safetensors").read_bytes()

    @given(mutated(good))
    def run(data):
        (tmp_path / "x.safetensors").write_bytes(data)
        with parsed_or_told():
            checkpoints.load(tmp_path / "x.safetensors")

    run()


AUDIT = {
    "format": "telltale-audit",
    "version": 1,
    "verdict": "pass",
    "short": [],
    "source": {"manifest_sha256": "0"},
    "splits": ["train"],
}


def test_audit(whole):
    @given(grafted(AUDIT).map(dump).map(str.encode) | mutated(dump(AUDIT).encode()), st.booleans())
    @example(b"[" * 100_000, True)
    def run(data, required):
        (whole / "audit.json").write_bytes(data)
        with parsed_or_told():
            audit_line(whole, required=required)

    run()


CALIBRATION = {
    "format": "telltale-calibration",
    "version": 1,
    "weights_sha256": "0" * 64,
    "temperature": 1.5,
    "thresholds": {"fake": 0.9, "real": 0.1},
}


def test_calibration(tmp_path):
    @given(grafted(CALIBRATION).map(dump).map(str.encode) | mutated(dump(CALIBRATION).encode()))
    @example(b"[" * 100_000)
    def run(data):
        (tmp_path / "best.calibration.json").write_bytes(data)
        with parsed_or_told():
            load_calibration(tmp_path / "best.pt", {"w": torch.zeros(1)})

    run()


def test_quarantine(shards, tmp_path):
    opened = ShardSet(shards, "train")
    line = {"split": "train", "sample_id": 3, "shard": "train/000000.tar", "key": 4}

    @given(grafted(line).map(dump).map(str.encode) | mutated(dump(line).encode() * 2))
    @example(b'{"split": "train", "sample_id": 99999999}\n')
    @example(b'{"split": "train", "sample_id": 1e999}\n')
    @example(b"[" * 100_000)
    def run(data):
        (tmp_path / "quarantine.jsonl").write_bytes(data)
        with parsed_or_told():
            found = Quarantine(opened, tmp_path / "quarantine.jsonl", 0.5)
            assert all(0 <= number < len(opened) for number in found.ids)

    run()
    assert math.ceil(0.5 * len(opened)) == Quarantine(opened, tmp_path / "none", 0.5).allowed
