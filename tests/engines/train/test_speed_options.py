"""What makes training faster leaves its numbers alone: bit for bit, or within what rounding explains."""

import pytest
import torch

from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.training_order import TrainingOrder, training_specs
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.train.trainer import Trainer
from tests.support import flags

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


@pytest.fixture
def losses(tiny_shards, repo_root):
    def train(**changes):
        words = flags(
            data__shards=tiny_shards, model__backbone="cifarnet_narrow", model__stem="imagenet", **changes
        )
        config = parse_config(words, repo_root / "configs" / "quickstart.yaml")
        trainer = Trainer(config, ALONE, ShardSet(tiny_shards, "train"), None)
        found = []
        for _ in range(5):
            trainer.train_step()
            found.append(trainer.pop_metrics()["loss"])
        return found

    return train


def test_channels_last_changes_no_more_than_rounding(losses):
    assert losses(train__channels_last=True) == pytest.approx(losses(train__channels_last=False), rel=1e-4)


@pytest.mark.slow  # compiling takes a minute
def test_a_compiled_model_changes_no_more_than_rounding(losses):
    assert losses(train__compile=True) == pytest.approx(losses(), rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{"data__threads": 3}, {"data__prefetch": 4}, {"data__resident": True}], ids=str
)
def test_how_input_is_prepared_changes_no_bit(losses, changes):
    assert losses(**changes) == losses()


def test_a_box_decoded_alone_is_the_box_of_the_whole_image(tiny_shards):
    def images(whole):
        shards, config = ShardSet(tiny_shards, "train"), DataConfig(size=16, crop="random")
        order = TrainingOrder(shards, config, 0, 32)
        work = training_specs(order, micro_batch=32, rank=0, world=1, first_step=0, last_step=2)
        device = torch.device("cpu")
        loader = Loader(shards, config, work, batch=32, device=device, train=True, whole_images=whole)
        return torch.cat([batch.image for batch in loader])

    assert torch.equal(images(whole=True), images(whole=False))
