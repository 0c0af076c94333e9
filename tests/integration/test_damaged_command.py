"""launch/train.py on shards that were damaged: it stops and says where, or skips and goes on exactly."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataio.loading.config import DataConfig
from dataio.loading.training_order import TrainingOrder
from dataio.shards.shard_set import ShardSet
from tests.support import environment, flags, wait_until


@pytest.fixture(scope="module")
def damaged(tiny_shards, tmp_path_factory):
    """Shards of which two training images are no longer images and one validation image is gone."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(tiny_shards, folder)
    train = ShardSet(folder, "train")
    ids = TrainingOrder(train, DataConfig(window_shards=2), 0, 16).step_ids(4)
    for shards, sample_id in ((train, ids[2]), (train, ids[13]), (ShardSet(folder, "val"), 1)):
        row = shards.rows[sample_id]
        with open(folder / shards.shards[int(row["shard"])]["file"], "rb+") as file:
            file.seek(int(row["offset"]))
            file.write(b"\0" * int(row["size"]))
    return folder


def train(shards, folder, **changes):
    return flags(
        **{
            "data__shards": shards,
            "run__dir": folder,
            "checkpoint__every": 3,
            "data__damaged_cap": 0.1,
            "optim__lr": 1e-6,  # rounding does not grow, so that losses can be compared
            **changes,
        }
    )


def steps(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key != "perf"} for record in records]


def quarantined(folder):
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return {(entry["split"], entry["sample_id"]) for entry in map(json.loads, lines)}


def test_a_damaged_sample_stops_all_ranks_and_is_named(damaged, torchrun, run, tmp_path):
    done = run(torchrun(2, "launch/train.py", *train(damaged, tmp_path / "run")))
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "not a decodable image, though it was when written" in said and ".tar key " in said


@pytest.mark.slow
def test_skipping_is_exact_over_processes_and_a_kill(damaged, torchrun, run, tmp_path):
    for world in (1, 2):
        command = torchrun(
            world, "launch/train.py", *train(damaged, tmp_path / str(world), data__damaged="skip")
        )
        done = run(command)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert "It is left out" in done.stderr
    listed = quarantined(tmp_path / "2")
    assert quarantined(tmp_path / "1") == listed
    assert len(listed) == 3 and ("val", 1) in listed
    one, two = steps(tmp_path / "1"), steps(tmp_path / "2")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    killed = tmp_path / "killed"
    command = torchrun(2, "launch/train.py", *train(damaged, killed, data__damaged="skip"))
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: any(record["step"] >= 5 for record in steps(killed)), 120, "step 5")
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert steps(killed) == two and quarantined(killed) == listed
    first, second = (load_file(folder / "final.safetensors") for folder in (killed, tmp_path / "2"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
