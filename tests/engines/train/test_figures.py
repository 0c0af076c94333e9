"""Pictures of a run: what validation collects for them, and that they are drawn."""

import numpy as np
import pytest
import torch
import wandb
from PIL import Image

from dataio.loading.pixels import to_pixels
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.runtime.run_log import LogConfig, RunLog
from engines.train.figures import RunFigures
from engines.train.trainer import Trainer
from tests.support import flags
from tests.wandb_file import read_wandb_file

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def trainer(tiny_shards, repo_root):
    settings = flags(data__shards=tiny_shards, log__images=5, train__steps=3)
    config = parse_config(settings, repo_root / "configs" / "quickstart.yaml")
    return Trainer(config, ALONE, ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val"))


def test_confusion_and_mistakes_agree_with_the_errors(trainer):
    trainer.train_step()
    found = trainer.validate()
    rows = trainer.val_set.rows
    assert found.confusion.sum() == len(rows)
    assert np.array_equal(found.confusion.sum(1), np.bincount(rows["generator"], minlength=5))
    wrong = found.confusion.sum() - np.trace(found.confusion)
    assert wrong == round(found.metrics["generator_error"] * len(rows)) > 0
    assert 0 < len(found.mistakes) <= 5
    losses = [mistake.loss for mistake in found.mistakes]
    assert losses == sorted(losses, reverse=True)
    for mistake in found.mistakes:
        assert mistake.truth != mistake.answer
        assert mistake.truth == rows["generator"][mistake.sample_id]
        assert mistake.image.shape == (24, 24, 3) and mistake.image.dtype == np.uint8


def test_pixels_are_those_of_the_file(trainer):
    batch = trainer.first_batch()
    pixels = to_pixels(batch.image, trainer.config.data.mean, trainer.config.data.std)
    again = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(0.5)).abs()
    assert again.mean() > 0.05  # a picture, not a constant
    mean = torch.tensor(trainer.config.data.mean).view(1, 3, 1, 1)
    std = torch.tensor(trainer.config.data.std).view(1, 3, 1, 1)
    renormalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(renormalised, batch.image.contiguous(), atol=0.02, rtol=0)


def test_every_panel_is_drawn_and_can_be_read(trainer, tmp_path):
    log = RunLog(tmp_path, LogConfig(wandb="off"), {})
    for step in (1, 2):
        log.write(
            {"kind": "train", "step": step, "loss": 2.0 / step, "generator_error": 0.5, "object_error": None}
        )
    panels = RunFigures(tmp_path, trainer.config, trainer.train_set.labels, log)
    panels.inputs(trainer.first_batch(), 0)
    panels.validation(trainer.validate(), 1)
    panels.curves()
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["confusion.png", "curves.png", "inputs.png", "mistakes.png"]
    for name in names:
        with Image.open(tmp_path / "images" / name) as picture:
            picture.load()
            assert len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 10
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_mistakes_go_to_weights_and_biases_as_a_table_with_their_pictures(trainer, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    log = RunLog(tmp_path, LogConfig(wandb="offline"), {})
    found = trainer.validate()
    log.write({"kind": "val", "step": 7, **found.metrics})
    RunFigures(tmp_path, trainer.config, trainer.train_set.labels, log).validation(found, 7)
    log.close(0)
    wandb.teardown()
    file = read_wandb_file(tmp_path)
    columns, rows, files = file.table("mistakes")
    assert [row[columns.index("sample id")] for row in rows] == [
        mistake.sample_id for mistake in found.mistakes
    ]
    for row, mistake in zip(rows, found.mistakes, strict=True):
        with Image.open(files[row[0]["path"]]) as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), mistake.image)
    # All of a validation in one row, at its step.
    [last] = file.history
    assert last["_step"] == 7 and {"images/confusion._type", "images/mistakes._type", "val/loss"} <= set(last)


def test_without_them_validation_collects_none(tiny_shards, repo_root):
    config = parse_config(flags(data__shards=tiny_shards), repo_root / "configs" / "quickstart.yaml")
    plain = Trainer(config, ALONE, ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val"))
    assert plain.validate().mistakes == [] and config.log.images == 0
