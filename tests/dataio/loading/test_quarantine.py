"""Damaged samples: named, or left out; the same ones by the same substitutes, however the work is shared."""

import errno
import json
import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.shards import tar_reader as tars
from dataio.shards.shard_set import ShardSet

CONFIG = DataConfig(size=24, crop="random_resized", window_shards=2)
STEPS, GLOBAL_BATCH = 6, 16


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def opened(folder, quarantine, cap=0.2, split="train"):
    shards = ShardSet(folder, split)
    return shards, Quarantine(shards, quarantine, cap)


def overwrite(folder, sample_id, what, split="train"):
    """Damage one sample: its bytes (undecodable) or its header (something else lies there)."""
    shards = ShardSet(folder, split)
    row = shards.rows[sample_id]
    offset, size = int(row["offset"]), int(row["size"])
    with open(folder / shards.shards[int(row["shard"])]["file"], "rb+") as file:
        file.seek(offset - 512 if what == "header" else offset)
        file.write(b"\0" * (512 if what == "header" else size))


def load(shards, quarantine=None, *, world=1, first=0, last=STEPS, config=CONFIG, micro_batch=4):
    """What every step's global batch was: ids and pixels by step."""
    steps: dict[int, list[Any]] = {}
    order = TrainingOrder(shards, config, 7, GLOBAL_BATCH)
    for rank in range(world):
        work = training_specs(
            order, micro_batch=micro_batch, rank=rank, world=world, first_step=first, last_step=last
        )
        loader = Loader(
            shards,
            config,
            work,
            batch=micro_batch,
            device=torch.device("cpu"),
            train=True,
            quarantine=quarantine,
        )
        per_step = GLOBAL_BATCH // world // micro_batch
        for number, batch in enumerate(loader):
            steps.setdefault(first + number // per_step, []).append((batch.sample_id, batch.image.clone()))
    return {
        step: tuple(torch.cat(column) for column in zip(*parts, strict=True)) for step, parts in steps.items()
    }


def first_ids(folder, *places):
    ids = TrainingOrder(ShardSet(folder, "train"), CONFIG, 7, GLOBAL_BATCH).step_ids(1)
    return [int(ids[place]) for place in places]


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, y) for step in a for x, y in zip(a[step], b[step], strict=True)
    )


@pytest.mark.parametrize("what", ["bytes", "header"])
def test_a_damaged_sample_stops_training_and_all_of_it_is_named(copy, what):
    (sample_id,) = first_ids(copy, 5)
    source = ShardSet(copy, "train").about(sample_id)["source"]
    overwrite(copy, sample_id, what)
    shards = ShardSet(copy, "train")
    row = shards.rows[sample_id]
    with pytest.raises(UserError) as caught:
        load(shards)
    told = str(caught.value)
    for part in (
        shards.shards[row["shard"]]["file"],
        f"key {row['key']:09d}",
        f"byte {row['offset']}",
        source,
    ):
        assert str(part) in told
    assert "telltale shard verify" in told and "\n" not in told


def test_what_is_left_out_is_the_same_for_any_number_of_processes_and_after_a_resume(copy, tmp_path):
    undamaged = load(ShardSet(copy, "train"))
    undecodable, elsewhere, last = first_ids(copy, 1, 6, 15)
    overwrite(copy, undecodable, "bytes")
    overwrite(copy, elsewhere, "header")
    overwrite(copy, last, "bytes")
    one = load(*opened(copy, tmp_path / "one.jsonl"))
    assert same(one, load(*opened(copy, tmp_path / "two.jsonl"), world=2))
    assert same(one, load(*opened(copy, tmp_path / "four.jsonl"), world=4))
    other = DataConfig(size=24, crop="random_resized", window_shards=2, prefetch=4, threads=2)
    assert same(one, load(*opened(copy, tmp_path / "other.jsonl"), config=other, micro_batch=2))
    resumed = load(*opened(copy, tmp_path / "one.jsonl"), first=3)
    assert same({step: one[step] for step in resumed}, resumed)
    anew = load(*opened(copy, tmp_path / "nothing.jsonl"), first=3)
    assert same(anew, resumed)
    # Everything else is as it was, to the pixel; what stands in has the same labels.
    rows, replaced = ShardSet(copy, "train").rows, 0
    for step in undamaged:
        ids, images = undamaged[step]
        found, shown = one[step]
        gone = torch.isin(ids, torch.tensor([undecodable, elsewhere, last]))
        assert torch.equal(ids[~gone], found[~gone]) and torch.equal(images[~gone], shown[~gone])
        for before, after in zip(ids[gone].tolist(), found[gone].tolist(), strict=True):
            replaced += 1
            assert after not in (undecodable, elsewhere, last)
            assert rows["generator"][before] == rows["generator"][after]
            assert (rows["object"][before] >= 0) == (rows["object"][after] >= 0)
    assert replaced >= 3
    listed = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert {entry["sample_id"] for entry in listed} == {undecodable, elsewhere, last} and len(listed) == 3
    assert all(entry["shard"].startswith("train/") and entry["source"] for entry in listed[:1])


def test_a_quarantine_is_respected_where_the_shard_was_repaired(tiny_shards, copy, tmp_path):
    (sample_id,) = first_ids(copy, 3)
    overwrite(copy, sample_id, "bytes")
    damaged = load(*opened(copy, tmp_path / "list.jsonl"))
    assert same(damaged, load(*opened(tiny_shards, tmp_path / "list.jsonl")))
    assert not same(damaged, load(*opened(tiny_shards, tmp_path / "other.jsonl")))


def test_half_a_line_of_a_killed_process_is_no_harm(copy, tmp_path):
    (sample_id,) = first_ids(copy, 3)
    overwrite(copy, sample_id, "header")
    expected = load(*opened(copy, tmp_path / "list.jsonl"))
    text = (tmp_path / "list.jsonl").read_text()
    (tmp_path / "list.jsonl").write_text(text[: len(text) // 2])
    assert same(expected, load(*opened(copy, tmp_path / "list.jsonl")))


def test_more_damage_than_the_cap_stops(copy, tmp_path):
    for sample_id in first_ids(copy, 1, 2, 3):
        overwrite(copy, sample_id, "header")
    shards, quarantine = opened(copy, tmp_path / "list.jsonl", cap=2 / len(ShardSet(copy, "train")))
    assert quarantine.allowed == 2
    with pytest.raises(
        UserError, match=r"3 samples of the train split are damaged by now, and data\.damaged_cap allows 2"
    ):
        load(shards, quarantine)


def test_validation_leaves_damaged_samples_out(copy, tmp_path):
    whole = ShardSet(copy, "test")
    overwrite(copy, 2, "bytes", "test")
    overwrite(copy, 9, "header", "test")
    for world in (1, 3):
        shards, quarantine = opened(copy, tmp_path / f"{world}.jsonl", split="test")
        found = []
        for rank in range(world):
            work = evaluation_specs(shards, CONFIG, batch=1 if world == 3 else 5, rank=rank, world=world)
            loader = Loader(
                shards,
                CONFIG,
                work,
                batch=5,
                device=torch.device("cpu"),
                train=False,
                quarantine=quarantine,
            )
            for batch in loader:
                assert torch.equal(
                    batch.generator,
                    torch.from_numpy(whole.rows["generator"][batch.sample_id.numpy()].astype(int)),
                )
                found += batch.sample_id.tolist()
        assert found == [i for i in range(len(whole)) if i not in (2, 9)]


def failing_disk(monkeypatch, failures, number):
    """The next `failures` reads fail, as the system call would on a failing disk."""
    left = [failures]
    read = os.pread

    def pread(descriptor, size, offset):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(tars, "_PAUSES", (0.0, 0.0, 0.0))
    return left


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_glitch_of_the_disk_is_tried_again(tiny_shards, monkeypatch, number):
    expected = load(ShardSet(tiny_shards, "train"))
    left = failing_disk(monkeypatch, 3, number)
    assert same(expected, load(ShardSet(tiny_shards, "train")))
    assert left == [0]


def test_a_disk_that_goes_on_failing_is_named(tiny_shards, monkeypatch):
    failing_disk(monkeypatch, 10**9, errno.EIO)
    with pytest.raises(UserError, match=r"train/00000\d\.tar key .*: cannot be read \(Input/output error\)"):
        load(ShardSet(tiny_shards, "train"))


def test_a_shard_that_is_removed_or_replaced_while_training_is_named(copy):
    for change, told in (
        ("remove", "No such file"),
        ("shorter", "the manifest says"),
        ("other", "something else"),
    ):
        shards = ShardSet(copy, "train")
        path = copy / shards.shards[0]["file"]
        good = path.read_bytes()
        path.unlink()
        if change != "remove":
            other = (copy / shards.shards[1]["file"]).read_bytes()
            path.write_bytes(
                good[:-1024] if change == "shorter" else other[: len(good)].ljust(len(good), b"\0")
            )
        with pytest.raises(UserError, match=f"{path} key .*{told}"):
            load(shards)
        path.unlink(missing_ok=True)
        path.write_bytes(good)


def test_an_index_that_points_outside_of_its_tar_is_named(copy):
    shards = ShardSet(copy, "train")
    for field, value in (("offset", 2**40), ("offset", 0), ("size", 2**32 - 1)):
        shards.rows = np.array(ShardSet(copy, "train").rows)
        shards.rows[field][4] = value
        with pytest.raises(UserError, match=r"key .*the index points beyond"):
            shards.read(4)
