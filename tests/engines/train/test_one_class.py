"""Training on one class: refused unless it is wanted, and without a real/fake error then."""

from types import SimpleNamespace

import pytest
import torch

from dataio.core.errors import UserError
from dataio.shards.shard_set import ShardSet
from engines.config.detector import from_dict
from engines.train.console import start_warnings, validation_line
from engines.train.meters import MetricSums
from engines.train.open_data import open_sets
from engines.train.selection import ModelSelection, check_validation_exists
from tests.dataio.sharding.test_one_class import listed, shard


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fakes")
    layout = listed(folder, ["adm", "glide", "adm", "adm"], ["train", "train", "train", "val"])
    shard(layout, folder / "shards", allow_one_class=True)
    return folder / "shards"


def config_of(shards, **more):
    return from_dict({"data": {"shards": str(shards), "size": 32, **more}})


def test_a_training_split_without_photographs_is_refused_unless_allowed(fakes):
    with pytest.raises(
        UserError, match=r"no photographs among the 3 training images, .*data\.allow_one_class true"
    ):
        open_sets(config_of(fakes))
    train_set, val_set = open_sets(config_of(fakes, allow_one_class=True))
    assert val_set is not None
    assert train_set.missing_class == val_set.missing_class == "photographs"


def test_what_is_selected_counts(fakes, tiny_shards):
    name = ShardSet(tiny_shards, "train").labels.generators[1]
    train_set, _ = open_sets(config_of(tiny_shards, generators=[name]))
    assert train_set.missing_class == ""


def test_a_null_error_cannot_select_the_best_weights(fakes):
    config = from_dict({"data": {"shards": str(fakes)}, "checkpoint": {"best": "real_fake_error"}})
    train_set, val_set = ShardSet(fakes, "train"), ShardSet(fakes, "val")
    with pytest.raises(
        UserError, match=r"checkpoint\.best real_fake_error: .*no photographs in its val split"
    ):
        check_validation_exists(config, train_set, val_set)
    config.checkpoint.best = "joint_error"
    check_validation_exists(config, train_set, val_set)
    assert ModelSelection(config, 1).score_of({"joint_error": None, "loss": 0.5}, 1) == 0.5


def test_the_error_of_one_class_is_null_and_not_printed():
    sums = MetricSums.empty(torch.device("cpu"))
    sums.add(torch.tensor([[0.0, 9.0]]), torch.zeros(1, 1), torch.tensor([1]), torch.tensor([-1]))
    assert sums.metrics()["real_fake_error"] == 0.0
    metrics = sums.metrics(both_classes=False)
    assert metrics["real_fake_error"] is None and metrics["generator_error"] == 0.0
    assert "real/fake" not in validation_line(3, metrics, is_best=False)


def test_an_old_folder_with_a_fake_called_real_is_named(tmp_path):
    # Versions before took every name but "nature" for a generator.
    shard(listed(tmp_path, ["nature", "adm", "glide"]), tmp_path / "shards")
    path = tmp_path / "shards" / "manifest.json"
    path.write_text(path.read_text().replace('"glide"', '"Real"'))
    trainer = SimpleNamespace(train_set=ShardSet(tmp_path / "shards", "train"), val_set=None)
    (warning,) = start_warnings(trainer)  # type: ignore[arg-type]
    assert "generator 'Real' is a word for photographs and is trained as a fake" in warning
