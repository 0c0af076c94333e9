"""The flags of shard and make-vqa that decide which labels are photographs."""

import pytest

from dataio.core.errors import UserError
from launch import make_vqa, shard
from tests.dataio.sharding.test_one_class import listed


@pytest.fixture
def words(tmp_path):
    with pytest.raises(UserError, match=r"generator '0' \(line 2\) does not say"):
        listed(tmp_path, ["0", "1", "1", "0.0"])
    source = ["--layout", "manifest", "--source", str(tmp_path / "list.csv"), "--codec.size", "32"]
    return [*source, "--output", str(tmp_path / "out"), "--workers", "1"]


def test_real_decides_and_is_a_setting_of_the_folder(words, capsys):
    assert shard.main([*words, "--real", "0"]) == 0
    out, err = capsys.readouterr()
    assert "'0' (1 row), '0.0' (1 row): read as photographs" in err
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["nature", "2"], ["1", "2"]]
    assert shard.main([*words, "--real", "0"]) == 0
    with pytest.raises(UserError, match="was begun with real '0', not '0,1'"):
        shard.main([*words, "--real", "0,1"])


def test_one_class_needs_its_flag(words, capsys):
    with pytest.raises(UserError, match=r"no fakes among its 4 images.*--allow-one-class"):
        shard.main([*words, "--real", "0,1"])
    assert shard.main([*words, "--real", "0,1", "--allow-one-class"]) == 0
    assert "note: the train split has no fakes" in capsys.readouterr().out


def test_make_vqa_takes_real_with_a_manifest_only(words, tmp_path):
    output = ["--output", str(tmp_path / "vqa")]
    with pytest.raises(UserError, match="--real belongs to --manifest"):
        make_vqa.main(["--shards", str(tmp_path), "--real", "0", *output])
    with pytest.raises(UserError, match=r"manifest .*generator '0' \(line 2\) does not say"):
        make_vqa.main(["--manifest", str(tmp_path / "list.csv"), *output])
