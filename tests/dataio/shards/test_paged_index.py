"""The index's rows in pages: what an array would give, in bounded memory, and no signal from a short file."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.core.errors import UserError
from dataio.shards import paged_index as rows
from dataio.shards import shard_set as index
from dataio.shards.manifest import SAMPLE
from dataio.shards.paged_index import PagedIndex
from dataio.shards.shard_set import ShardSet


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An index of 103 rows, and the file it lies in."""
    array = np.zeros(103, SAMPLE)
    array["key"], array["width"] = np.arange(103), np.arange(103) * 7 % 50
    path = tmp_path_factory.mktemp("rows") / "index.npy"
    np.save(path, array)
    return array, path


def small_pages(patch):
    patch.setattr(rows, "_SHIFT", 3)
    patch.setattr(rows, "PAGE", 8)
    patch.setattr(rows, "_SLOTS", 3)
    patch.setattr(rows, "_CHUNK", 20)


def opened(path, count, fault=lambda part: ""):
    return PagedIndex(path, SAMPLE, count, np.load(path, mmap_mode="r").offset, fault)


@given(st.lists(st.lists(st.integers(0, 102), max_size=40), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_array_whatever_was_asked_before(stored, asked):
    array, path = stored
    with pytest.MonkeyPatch.context() as patch:
        small_pages(patch)
        found = opened(path, 103)
        for ids in asked:
            assert np.array_equal(found[np.array(ids, np.int64)], array[np.array(ids, np.int64)])
        assert len(found._pages) == 3


def test_it_is_used_as_an_array(stored, monkeypatch):
    small_pages(monkeypatch)
    array, path = stored
    found = opened(path, 103)
    assert len(found) == 103 and found[102] == array[102]
    assert np.array_equal(found["width"], array["width"]) and found["width"].flags.c_contiguous
    assert np.array_equal(found[5:90:3], array[5:90:3]) and np.array_equal(np.array(found), array)
    assert np.array_equal(found[array["width"] > 20], array[array["width"] > 20])
    assert [row["key"] for row in found] == list(range(103))
    assert len(found[[]]) == 0
    for wrong in (103, -1, [4, -1], np.zeros(102, bool)):
        with pytest.raises(IndexError):
            found[wrong]


def test_a_row_stays_as_it_is_when_its_page_goes(stored, monkeypatch):
    small_pages(monkeypatch)
    array, path = stored
    found = opened(path, 103)
    kept = [found[i] for i in (5, 5, 100)]
    assert len(found[np.arange(103)]) == 103
    assert kept == [array[i] for i in (5, 5, 100)]


def test_a_fault_of_a_page_is_named_when_it_is_read_and_again(stored, monkeypatch):
    small_pages(monkeypatch)
    array, path = stored
    found = opened(path, 103, lambda part: "key 50 is there" if 50 in part["key"] else "")
    assert np.array_equal(found[[1, 60]], array[[1, 60]])
    for _ in range(2):
        with pytest.raises(UserError, match=r"index\.npy: key 50 is there; copy it again"):
            found[[55]]
    assert np.array_equal(found[[57]], array[[57]])


def test_an_index_cut_short_while_it_is_read_is_named_and_kills_nobody(copy, monkeypatch):
    small_pages(monkeypatch)
    shards = ShardSet(copy, "train")
    shards.read(0)
    os.truncate(copy / "train" / "index.npy", 2000)
    with pytest.raises(UserError, match=r"train/index\.npy: 2000 bytes, it had more: truncated"):
        shards.read(len(shards) - 1)


def test_a_wrong_row_of_a_large_index_is_named_when_it_is_read(copy, monkeypatch):
    small_pages(monkeypatch)
    path = copy / "train" / "index.npy"
    array = np.load(path)
    array["generator"][-1] = 99
    np.save(path, array)
    with pytest.raises(UserError, match="generator is 99, expected 0 to"):
        ShardSet(copy, "train")
    monkeypatch.setattr(index, "CHECKED_ON_OPEN", len(array) - 1)
    shards = ShardSet(copy, "train")
    shards.read_many(np.arange(20))
    with pytest.raises(UserError, match="generator is 99, expected 0 to"):
        shards.read_many(np.array([len(array) - 1]))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_what_the_manifest_says_of_all_rows_is_so(tiny_shards, split):
    shards = ShardSet(tiny_shards, split)
    width, height = shards.rows["width"], shards.rows["height"]
    assert shards.image_sizes() == (width.min(), width.max(), height.min(), height.max())
    del shards.manifest["splits"][split]["smallest"]  # as in folders of before
    assert shards.image_sizes() == (width.min(), width.max(), height.min(), height.max())
    known = shards.rows["object"] >= 0
    assert shards.objects_alike() == (True if known.all() else None if known.any() else False)
