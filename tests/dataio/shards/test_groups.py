"""Groups from a CSV, joined to shards by the paths their images came from."""

import csv

import pytest

from dataio.core.errors import UserError
from dataio.shards.groups import groups_of, read_groups
from dataio.shards.shard_set import ShardSet


def write(path, rows, columns=("path", "group")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_samples_get_the_groups_of_their_sources_in_any_order(tiny_shards, tmp_path):
    shards = ShardSet(tiny_shards, "train")
    sources = [shards.about(number)["source"] for number in range(len(shards))]
    assert len(set(sources)) == len(shards)
    groups = read_groups(write(tmp_path / "groups.csv", [(path, path[-6:]) for path in sorted(sources)]))
    ids = [5, 0, len(shards) - 1]
    assert groups_of(shards, ids, groups, "groups.csv") == [sources[number][-6:] for number in ids]
    del groups[sources[0]]
    with pytest.raises(
        UserError, match=f"does not name {sources[0]} .*expected every image of the train split"
    ):
        groups_of(shards, ids, groups, "groups.csv")


def test_paths_and_groups_are_read_as_the_manifest_layout_reads_them(tmp_path):
    rows = [("./a//b.jpg", "caf\u00e9"), ("c.jpg", "cafe\u0301")]
    assert read_groups(write(tmp_path / "groups.csv", rows)) == {"a/b.jpg": "caf\u00e9", "c.jpg": "caf\u00e9"}
    with pytest.raises(UserError, match="line 2: 3 fields, expected 2"):
        read_groups(write(tmp_path / "groups.csv", [("a", "b", "c")]))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a", "1"), ("a", "2")], ("path", "group"), "line 3: a is in '1' and in '2'"),
        ([("a", "1")], ("path", "cluster"), "no column .group.; expected path, group, found path, cluster"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, columns, message):
    with pytest.raises(UserError, match=message):
        read_groups(write(tmp_path / "groups.csv", rows, columns))
    with pytest.raises(UserError, match="cannot be read"):
        read_groups(tmp_path / "none.csv")
