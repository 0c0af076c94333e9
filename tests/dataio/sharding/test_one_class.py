"""Sets without photographs or without fakes: refused unless they are wanted, and then said."""

import numpy as np
import pytest
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import preset_policy
from dataio.layouts import open_layout
from dataio.sharding.job import write_shards
from dataio.sharding.merge import summary
from dataio.shards.shard_set import ShardSet


def listed(folder, generators, splits=None):
    """A manifest layout of one noise image for each generator."""
    lines = ["path,generator,object,split"]
    for number, generator in enumerate(generators):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{generator},,{splits[number] if splits else 'train'}")
    (folder / "list.csv").write_text("\n".join(lines))
    return open_layout("manifest", folder / "list.csv")


def shard(layout, output, **settings):
    return write_shards(layout, output, preset_policy("default", 32), quiet=True, **settings)


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        (
            ["glide", "adm", "adm"],
            r"no photographs among its 3 images, only adm \(2\), glide \(1\); .*--real NAME",
        ),
        (["nature", "real"], r"no fakes among its 2 images, only nature \(2\); add them, or accept"),
    ],
)
def test_one_class_is_refused_before_anything_is_written_unless_a_flag_allows_it(
    tmp_path, generators, message
):
    layout = listed(tmp_path, generators)
    with pytest.raises(UserError, match=message + r".*\(--allow-one-class\)"):
        shard(layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = shard(layout, tmp_path / "out", allow_one_class=True)
    lacks = "photographs" if "glide" in generators else "fakes"
    assert ShardSet(tmp_path / "out", "train").missing_class == lacks
    assert f"note: the train split has no {lacks}; telltale train refuses it" in summary(manifest)
    assert shard(layout, tmp_path / "out") == manifest  # finished: the flag is no setting


def test_a_layout_without_free_names_has_no_real_option_to_recommend(tmp_path):
    for number in range(2):
        folder = tmp_path / "data" / "Midjourney" / "imagenet_midjourney" / "train" / "ai"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number:03d}_midjourney_{number}.png")
    with pytest.raises(UserError, match=r"no photographs among its 2 images") as error:
        shard(open_layout("genimage", tmp_path / "data"), tmp_path / "out")
    assert "--real" not in str(error.value) and "--allow-one-class" in str(error.value)


def test_a_split_that_lacks_one_class_is_a_note(tmp_path):
    layout = listed(tmp_path, ["nature", "adm", "adm", "nature"], ["train", "train", "val", "test"])
    text = summary(shard(layout, tmp_path / "out"))
    assert "note: the val split has no photographs; real/fake figures on it are null" in text
    assert "note: the test split has no fakes" in text and "the train split" not in text
    lacks = [ShardSet(tmp_path / "out", split).missing_class for split in ("train", "val", "test")]
    assert lacks == ["", "photographs", "fakes"]
