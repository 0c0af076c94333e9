"""Sets of so many shards that they are listed in a table: the same samples, the same checks, later."""

import json
import shutil

import numpy as np
import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.sharding.merge import summary
from dataio.sharding.verify import verify_shards
from dataio.shards import shard_table
from dataio.shards.local_cache import CacheOptions
from dataio.shards.manifest import read_manifest, sha256_of
from dataio.shards.shard_set import ShardSet
from dataio.shards.shard_table import ENTRY, ShardTable, to_entries
from engines.audit.sample import open_splits, refs_of_shards
from engines.train.schedule import data_fingerprint
from tests.support import write_tiny_shards


@pytest.fixture(scope="module")
def tabled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_table, "TABLE_FROM", 3)
        return write_tiny_shards(tmp_path_factory.mktemp("tabled"))


@pytest.fixture
def copy(tabled, tmp_path):
    shutil.copytree(tabled, tmp_path / "shards")
    return tmp_path / "shards"


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_table_says_what_the_list_says(tabled, tiny_shards):
    listed, other = read_manifest(tiny_shards), read_manifest(tabled)
    assert (listed["version"], other["version"]) == (1, 2)
    assert isinstance(other["splits"]["train"]["shards"], ShardTable)
    assert isinstance(other["splits"]["val"]["shards"], list)  # too few for a table
    assert len(json.loads((tabled / "manifest.json").read_text())["splits"]["train"]["table"]) == 4
    for split in listed["splits"]:
        shards = other["splits"][split]["shards"]
        assert list(shards) == list(shards[:]) == listed["splits"][split]["shards"]
        assert len(shards) < 2 or shards[-1] == listed["splits"][split]["shards"][-1]
    assert summary(other) == summary(listed)
    for path in tiny_shards.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (tabled / path.relative_to(tiny_shards)).read_bytes() == path.read_bytes()


def test_everything_reads_a_set_with_a_table(tabled, tiny_shards, tmp_path):
    ours, theirs = ShardSet(tabled, "train", verify=True), ShardSet(tiny_shards, "train")
    assert data_fingerprint(ours) == data_fingerprint(theirs)
    assert np.array_equal(ours.shard_sizes, theirs.shard_sizes)
    assert [ours.read(i).tobytes() for i in range(len(ours))] == [
        theirs.read(i).tobytes() for i in range(len(theirs))
    ]
    checked, faults = verify_shards(tabled)
    assert faults == [] and checked > 100
    splits = ("train", "val", "test")
    assert [ref.name for ref in refs_of_shards(open_splits(tabled, splits))] == [
        ref.name for ref in refs_of_shards(open_splits(tiny_shards, splits))
    ]
    ours = ShardSet(tabled, "train", cache=CacheOptions(tmp_path / "cache"))
    assert ours.tars.cache is not None
    ours.tars.cache.plan(range(len(ours.shards)))
    assert ours.tars.cache.wait(120)
    assert ours.read(3).tobytes() == theirs.read(3).tobytes()
    config = DataConfig(size=24, crop="random", window_shards=2)
    batches = []
    for shards in (ours, theirs):
        work = training_specs(
            TrainingOrder(shards, config, 0, 16), micro_batch=8, rank=0, world=1, first_step=0, last_step=3
        )
        loader = Loader(shards, config, work, batch=8, device=torch.device("cpu"), train=True)
        batches.append([(batch.image.clone(), batch.sample_id) for batch in loader])
    for (image, ids), (image_, ids_) in zip(*batches, strict=True):
        assert torch.equal(image, image_) and torch.equal(ids, ids_)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "missing, but the manifest lists it"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "truncated or changed"),
    "changed": (
        lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" * 9),
        "its SHA-256 is not the manifest's",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_table_is_named(copy, kind):
    spoil, told = DAMAGE[kind]
    spoil(copy / "train" / "shards.npy")
    for read in (lambda: ShardSet(copy, "train"), lambda: verify_shards(copy)):
        with pytest.raises(UserError, match=rf"train/shards\.npy: .*{told}"):
            read()
    ShardSet(copy, "val")  # has no part in it


def entries_with(name, value):
    def change(entries):
        entries[name][0] = value
        return entries

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda entries: entries[1:], "not a table of"),
        (lambda entries: np.zeros(3), "not a table of"),
        (lambda entries: entries[::-1].astype(ENTRY.newbyteorder(">")), "not a table of"),
        (entries_with("samples", 1000), "its samples are not the sum"),
        (entries_with("bytes", 2**64 - 1), "bytes is 18446744073709551615, expected a non-negative count"),
    ],
)
def test_a_table_that_is_none_is_refused_even_where_its_hash_was_made_to_fit(copy, change, told):
    path = copy / "train" / "shards.npy"
    np.save(path, change(np.load(path)))
    facts = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    change_manifest(copy, lambda manifest: manifest["splits"]["train"]["table"].update(facts))
    with pytest.raises(UserError, match=told):
        ShardSet(copy, "train")


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("kind", ["missing", "truncated"])
def test_a_damaged_shard_is_named_as_ever_when_it_is_first_opened(copy, tmp_path, suffix, kind):
    shards = ShardSet(copy, "train")
    path = copy / shards.shards[1]["file"]
    first = int(shards.shard_sizes[0])
    DAMAGE[kind][0](path.with_suffix(suffix))
    with pytest.raises(UserError) as before:
        ShardSet(copy, "train", verify=True)
    shards = ShardSet(copy, "train")
    shards.read(0)
    config = DataConfig(size=24, crop="random", window_shards=2)
    loader = Loader(
        shards,
        config,
        evaluation_specs(shards, config, batch=first, rank=0, world=1),
        batch=first,
        device=torch.device("cpu"),
        train=False,
        quarantine=Quarantine(shards, tmp_path / "damaged.jsonl", 1.0),
    )
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == str(before.value) and DAMAGE[kind][1] in str(caught.value)
    assert not (tmp_path / "damaged.jsonl").exists()  # no sample's damage: the set is not whole


def test_only_version_2_has_tables_and_later_ones_are_refused(copy):
    change_manifest(copy, lambda manifest: manifest.update(version=1))
    with pytest.raises(UserError, match=r"splits\.train\.shards must be a list"):
        ShardSet(copy, "train")
    for version in (3, True, "2", None, [1]):
        change_manifest(copy, lambda manifest, version=version: manifest.update(version=version))
        with pytest.raises(UserError, match="this telltale reads versions 1 and 2"):
            ShardSet(copy, "train")


@pytest.mark.parametrize(
    "change", [{"file": "../x.npy"}, {"file": 5}, {"shards": -1}, {"sha256": "0"}, {"bytes": None}]
)
def test_the_manifests_entry_of_a_table_is_checked(copy, change):
    change_manifest(copy, lambda manifest: manifest["splits"]["train"]["table"].update(change))
    with pytest.raises(UserError, match=rf"splits\.train\.table\.{next(iter(change))} (is|must be)"):
        read_manifest(copy)


def test_numbers_of_shards_left_out_and_beyond_six_digits_are_kept(tmp_path):
    digest = "ab" * 32
    shards = [
        {"file": f"train/{number:06d}.tar", "samples": 2, "bytes": 5, "sha256": digest}
        | {"idx_bytes": 1, "idx_sha256": digest}
        for number in (0, 2, 1_234_567)
    ]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "shards.npy"
    np.save(path, to_entries(shards))
    entry = {"file": "train/shards.npy", "bytes": path.stat().st_size, "sha256": sha256_of(path), "shards": 3}
    assert list(ShardTable(tmp_path, entry, 6)) == shards
