"""Originals: from a layout or from kept shards, the same images, the same subset, seen through a view."""

import pickle

import pytest

from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.layouts.synthetic import SyntheticLayout, write_synthetic
from dataio.perturb.aligned_views import LEFT_OUT, Degraded, JpegAll, JpegFakes
from dataio.perturb.originals import KeptLayout, choose_originals
from dataio.sharding.job import write_shards
from dataio.shards.shard_set import ShardSet
from dataio.sources.source import identity_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("originals")
    write_synthetic(path / "source", images=160, size=32, seed=5)
    write_shards(layout(path), path / "kept", preset_policy("keep"), samples_per_shard=9, quiet=True)
    return path


def layout(path):
    return SyntheticLayout(path / "source", val_fraction=0.1)


def test_kept_shards_give_the_records_and_bytes_of_the_layout(folder):
    kept, source = KeptLayout(folder / "kept", "test"), layout(folder)
    ours = {record.path: record for record in kept.records()}
    theirs = {record.path: record for record in source.records() if record.split == "test"}
    assert len(ours) > 20 and ours == theirs
    assert (tuple(kept.generators), tuple(kept.objects)) == (tuple(source.generators), tuple(source.objects))
    again = pickle.loads(pickle.dumps(kept.source))
    for path in ours:
        assert kept.read(path) == source.read(path) == again.read(path)
    assert again.has(path) and not again.has("elsewhere.png") and set(again.files()) == set(ours)


def test_a_subset_depends_on_seed_and_paths_alone(folder):
    kept, source = KeptLayout(folder / "kept", "test"), layout(folder)

    def paths(origin, images, seed=0):
        return [record.path for record in choose_originals(origin, "test", images, seed).records]

    assert paths(kept, 10) == paths(source, 10) and len(set(paths(source, 10))) == 10
    assert paths(source, 5) == paths(source, 10)[:5] == paths(source, 0)[:5]
    assert set(paths(source, 10, seed=1)) != set(paths(source, 10))
    assert len(paths(source, 10_000)) == len(paths(source, 0)) > 10


def test_a_view_and_kept_shards_have_the_identity_of_the_original(folder):
    path = choose_originals(layout(folder), "test", 1, 0).records[0].path
    original = layout(folder).read(path)
    for origin in (layout(folder), KeptLayout(folder / "kept", "test")):
        seen = choose_originals(origin, "test", 1, 0).through(JpegAll(30)).source.read_original(path)
        assert seen[0] != original and seen[1] == identity_of(original)


def test_views_are_applied_while_sharding_and_left_out_images_are_rejected_with_the_reason(folder, tmp_path):
    originals = choose_originals(layout(folder), "test", 0, 0)
    view = JpegFakes(96)
    for workers in (1, 2):
        write_shards(
            originals.through(view),
            tmp_path / f"{workers}",
            preset_policy("keep"),
            workers=workers,
            samples_per_shard=5,
            quiet=True,
        )
    one, two = (ShardSet(tmp_path / f"{n}", "test") for n in (1, 2))
    assert one.manifest == two.manifest
    reasons = {entry["path"]: entry["reason"] for entry in one.manifest["rejected"]}
    photographs = {r.path for r in originals.records if r.generator == "nature"}
    assert reasons and set(reasons) < photographs
    assert all(reason.startswith(LEFT_OUT) for reason in reasons.values())
    assert len(one) == len(originals.records) - len(reasons)
    kept = KeptLayout(tmp_path / "1", "test")
    for record in kept.records():
        expected = view(originals.layout.read(record.path), record.path, record.path in photographs)
        assert kept.read(record.path) == expected
    # Nothing but the split that is evaluated.
    assert one.manifest["splits"]["train"]["samples"] == one.manifest["splits"]["val"]["samples"] == 0


def test_a_checkpoints_own_history_is_used_and_not_that_of_the_test_images(folder, tmp_path):
    originals = choose_originals(layout(folder), "test", 0, 0)
    history = {"17:2": 1}
    policy = preset_policy("default", 32)
    policy = type(policy).from_dict({**policy.to_dict(), "history": history})
    manifest = write_shards(originals.through(Degraded()), tmp_path / "out", policy, quiet=True)
    assert manifest["codec"]["history"] == history


def test_shards_that_keep_no_originals_are_refused(folder, tiny_shards):
    for origin, split, message in (
        (tiny_shards, "test", "its codec preset is default, so the originals are gone"),
        (folder / "kept", "tset", "no split 'tset'"),
        (folder / "nowhere", "test", "no such folder of shards"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            KeptLayout(origin, split)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no images in the tset split"):
        choose_originals(layout(folder), "tset", 0, 0)
