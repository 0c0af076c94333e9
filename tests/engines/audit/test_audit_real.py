"""The audit on real images: leaks that are known to be there are found and named."""

import pytest

from dataio.images.codec import preset_policy
from dataio.layouts import open_layout
from dataio.sharding.job import write_shards
from engines.audit.audit import AuditSettings, audit_layout, audit_shards


@pytest.fixture(scope="module")
def mini(shared_data):
    labels = shared_data / "genimage-mini-LOC_val_solution.csv"
    return open_layout("genimage", shared_data / "genimage-mini", val_labels=labels)


@pytest.mark.slow
def test_genimage_as_published_fails_by_format_and_dimensions(mini):
    found = audit_layout(mini, AuditSettings(sample=160, quiet=True))
    assert found["verdict"] == "fail"
    assert found["reasons"][0].startswith("container leak")
    assert "format (1.000)" in found["reasons"][0] and "dimensions (1.000)" in found["reasons"][0]
    assert found["probes"]["container"]["overall"]["low"] > 0.99
    assert found["order"]["names"]["object_wrong"] == 0
    # Few classes of the thousand are there: counting them would shift nearly all.
    assert found["order"]["counting"]["shifted_images"] > 100


@pytest.mark.slow
def test_its_shards_have_no_container_leak_and_what_remains_is_said(mini, tmp_path):
    write_shards(mini, tmp_path / "shards", preset_policy("default"), samples_per_shard=100, quiet=True)
    found = audit_shards(tmp_path / "shards", AuditSettings(quiet=True))
    assert found["verdict"] == "warn"
    container = found["probes"]["container"]
    assert container["overall"]["auroc"] == 0.5
    assert {one["auroc"] for one in container["generators"].values()} == {0.5}
    # These fakes were JPEGs of 256 px before they became PNGs, and are not resized again.
    assert "carried by JPEG history" in found["reasons"][0]
    assert not any(one["low"] and one["low"] > 0.6 for one in found["origins"].values())


@pytest.mark.slow
def test_sources_of_natural256_were_resized_differently(shared_data):
    layout = open_layout("manifest", shared_data / "natural256" / "labels.csv")
    found = audit_layout(layout, AuditSettings(sample=800, quiet=True))
    assert found["verdict"] == "warn" and found["settings"]["grouped"]
    assert not found["probes"]["container"]["overall"]["low"] > 0.55
    leak = next(reason for reason in found["reasons"] if reason.startswith("pixel statistics leak"))
    assert "radial spectrum" in leak and "resize factor" in leak
    assert "Photographs of different sources were not treated alike either" in leak
