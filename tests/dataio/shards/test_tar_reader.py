"""Small tars in memory: the same bytes and the same complaints with fewer reads."""

import errno
import os
import shutil
import time

import numpy as np
import pytest

from dataio.core.errors import UserError
from dataio.shards import tar_reader as tars
from dataio.shards.local_cache import CacheOptions
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import DamagedSample


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def reads(monkeypatch):
    """The sizes of all reads of tars."""
    seen, read = [], os.pread

    def pread(descriptor, size, offset):
        seen.append(size)
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return seen


def shuffled(shards, seed=0):
    return np.random.default_rng(seed).permutation(len(shards))


def everything(shards, batch=7):
    ids = shuffled(shards)
    found: dict[int, bytes] = {}
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        found |= {i: data.tobytes() for i, data in zip(part.tolist(), shards.read_many(part), strict=True)}
    return [found[i] for i in range(len(shards))]


def one_by_one(shards):
    return [shards.read(i).tobytes() for i in range(len(shards))]


def test_whole_tars_give_the_same_bytes_with_fewer_reads(tiny_shards, reads):
    shards = ShardSet(tiny_shards, "train")
    expected = one_by_one(shards)
    assert len(reads) == len(shards)
    reads.clear()
    fresh = ShardSet(tiny_shards, "train")
    assert everything(fresh) == expected
    assert len(reads) < len(shards) / 2
    assert {entry["bytes"] for entry in shards.shards} <= set(reads)


@pytest.mark.parametrize("cap", [0, 1, 2, 3])
def test_memory_stays_within_the_cap(tiny_shards, monkeypatch, cap):
    shards = ShardSet(tiny_shards, "train")
    expected, largest = one_by_one(shards), max(entry["bytes"] for entry in shards.shards)
    monkeypatch.setattr(tars, "_WHOLE", cap * largest)
    monkeypatch.setattr(tars, "_FITTING", 1)
    monkeypatch.setattr(tars, "_IDLE", 10)
    for _ in range(3):
        assert everything(shards, 5) == expected
        kept = shards.tars._whole.values()
        assert sum(len(whole.data) for whole in kept) <= cap * largest
        assert len(kept) >= min(cap, 1)


def test_a_large_tar_is_read_by_samples(tiny_shards, monkeypatch, reads):
    shards = ShardSet(tiny_shards, "train")
    monkeypatch.setattr(tars, "_WHOLE", min(entry["bytes"] for entry in shards.shards))
    everything(shards)
    assert len(reads) == len(shards)


def test_damage_in_a_whole_tar_is_that_samples_alone(copy):
    row = ShardSet(copy, "train").rows[8]
    entry = ShardSet(copy, "train").shards[int(row["shard"])]
    with open(copy / entry["file"], "rb+") as file:
        file.seek(int(row["offset"]) - 512)
        file.write(b"\0" * 512)
    shards = ShardSet(copy, "train")
    with pytest.raises(UserError) as single:
        shards.read(8)
    others = np.array([i for i in range(len(shards)) if i != 8])
    for _ in range(3):
        found = shards.read_many(others)
        assert [data.tobytes() for data in found] == [shards.read(i).tobytes() for i in others.tolist()]
        assert int(row["shard"]) in shards.tars._whole
        with pytest.raises(DamagedSample) as caught:
            shards.read_many(np.array([1, 8, 2]))
        assert str(caught.value) == str(single.value) and "something else" in str(caught.value)


def test_a_tar_that_cannot_be_read_as_a_whole_is_read_by_samples(tiny_shards, monkeypatch):
    shards = ShardSet(tiny_shards, "train")
    expected, read = one_by_one(shards), os.pread
    whole = {entry["bytes"] for entry in shards.shards}

    def pread(descriptor, size, offset):
        if size in whole:
            raise OSError(errno.ENXIO, "a bad place")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert everything(shards) == expected and not shards.tars._whole


def test_what_points_outside_of_a_whole_tar_is_named(copy):
    shards = ShardSet(copy, "train")
    shards.read_many(np.arange(len(shards)))
    assert 0 in shards.tars._whole
    good = np.array(shards.rows)
    for field, value in (("offset", 2**40), ("offset", 0), ("size", 2**32 - 1)):
        shards.rows = good.copy()
        shards.rows[field][4] = value
        with pytest.raises(UserError, match=r"key .*the index points beyond"):
            shards.read_many(np.array([3, 4]))


def test_a_member_whose_header_reaches_beyond_a_whole_tar_is_named(copy):
    shards = ShardSet(copy, "train")
    entry, rows = shards.shards[0], np.array(shards.rows)
    last = int(shards.shard_sizes[0]) - 1
    with open(copy / entry["file"], "rb+") as file:
        file.seek(int(rows["offset"][last]) - 512 + 124)
        file.write(b"%011o" % entry["bytes"])
    shards.read_many(np.arange(last))
    assert 0 in shards.tars._whole
    shards.rows = rows
    shards.rows["size"][last] = entry["bytes"]
    with pytest.raises(UserError, match=r"key .*the index points beyond"):
        shards.read_many(np.array([last]))


def test_a_tar_found_to_be_changed_is_not_read_from_memory_either(copy, tmp_path):
    shards = ShardSet(copy, "train")
    path = copy / shards.shards[0]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # in the padding: no sample shows it
    shards = ShardSet(copy, "train", cache=CacheOptions(tmp_path / "cache"))
    own, deadline = np.flatnonzero(shards.rows["shard"] == 0), time.monotonic() + 60
    # Read from memory, until the thread that makes the copy has seen it.
    with pytest.raises(UserError, match="the tar's SHA-256 is not the manifest's"):
        while time.monotonic() < deadline:
            shards.read_many(own)
