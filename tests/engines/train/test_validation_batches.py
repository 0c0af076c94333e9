"""A validation's batches: every pass is complete, whether its loader is kept or not; the hardest mistakes."""

import numpy as np
import pytest
import torch

from dataio.loading.in_memory import preload
from dataio.loading.quarantine import Quarantine
from dataio.shards.shard_set import ShardSet
from engines.config.detector import parse_config
from engines.runtime.distributed import World
from engines.train.validate import validate
from engines.train.validation_batches import ValidationBatches
from models.detector.dual_head import DualHead
from tests.support import flags


@pytest.fixture(scope="module")
def config(tiny_shards, repo_root):
    changes = {"data__shards": tiny_shards, "log__images": 5}
    return parse_config(flags(**changes), repo_root / "configs" / "quickstart.yaml")


def world_of(rank=0, size=1):
    return World(rank=rank, size=size, local_rank=0, device=torch.device("cpu"), distributed=False)


def one_pass(batches):
    taken = list(batches)
    return [i for b in taken for i in b.sample_id.tolist()], torch.cat([b.image.clone() for b in taken])


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_kept_loader_gives_each_pass_what_a_new_one_does(config, tiny_shards, rank, resident):
    shards = ShardSet(tiny_shards, "val")
    memory = preload(config.data, torch.device("cpu"), shards)[0] if resident else None
    kept, new = (
        ValidationBatches(shards, config, world_of(rank, 3), in_memory=memory, keep=keep)
        for keep in (True, False)
    )
    ids, images = one_pass(new)
    assert ids == list(range(len(shards) * rank // 3, len(shards) * (rank + 1) // 3))
    for _ in range(3):
        found, pictures = one_pass(kept)
        assert found == ids and torch.equal(pictures, images)


def test_a_pass_that_was_given_up_is_followed_by_a_whole_one(config, tiny_shards):
    shards = ShardSet(tiny_shards, "val")
    batches = ValidationBatches(shards, config, world_of(), keep=True)
    for batch in batches:
        assert batch.sample_id[0] == 0
        break
    assert one_pass(batches)[0] == list(range(len(shards)))


def test_damaged_samples_at_the_end_do_not_run_into_the_next_pass(config, tiny_shards, tmp_path):
    shards = ShardSet(tiny_shards, "train")
    damaged = set(range(len(shards) - 6, len(shards))) | {0}  # in batches of 4 the last one is empty
    (tmp_path / "list.jsonl").write_text("")
    quarantine = Quarantine(shards, tmp_path / "list.jsonl", cap=0.9)
    for number in sorted(damaged):
        quarantine.add(number, shards.damaged(number, "cannot be decoded"))
    batches = ValidationBatches(shards, config, world_of(), quarantine=quarantine, keep=True)
    expected = [number for number in range(len(shards)) if number not in damaged]
    for _ in range(3):
        assert one_pass(batches)[0] == expected


def test_a_rank_without_samples_has_no_batches(config, tiny_shards):
    shards = ShardSet(tiny_shards, "val")
    size = len(shards) + 1
    empty = [r for r in range(size) if len(shards) * r // size == len(shards) * (r + 1) // size]
    assert list(ValidationBatches(shards, config, world_of(empty[0], size), keep=True)) == []


def test_the_hardest_mistakes_are_those_of_the_whole_split(config, tiny_shards):
    shards = ShardSet(tiny_shards, "val")
    torch.manual_seed(0)
    model = DualHead(config.model, shards.labels.generators, shards.labels.objects).eval()
    batches = ValidationBatches(shards, config, world_of(), keep=True)
    found = [validate(model, shards, config, world_of(), batches=batches) for _ in range(2)]
    assert found[0].metrics == found[1].metrics == validate(model, shards, config, world_of()).metrics
    with torch.no_grad():
        logits = torch.cat([model(batch.image)[0] for batch in batches])
    truth = torch.from_numpy(shards.rows[np.arange(len(shards))]["generator"].astype(np.int64))
    loss = -logits.log_softmax(1)[torch.arange(len(truth)), truth]
    wrong = (logits.argmax(1) != truth).nonzero()[:, 0].tolist()
    hardest = sorted(wrong, key=lambda number: -loss[number])[: config.log.images]
    assert [mistake.sample_id for mistake in found[1].mistakes] == hardest
    for mistake in found[1].mistakes:
        assert (
            mistake.truth == truth[mistake.sample_id] and mistake.answer == logits[mistake.sample_id].argmax()
        )
        assert mistake.loss == pytest.approx(float(loss[mistake.sample_id]), rel=1e-4)
    confusion = np.zeros_like(found[0].confusion)
    np.add.at(confusion, (truth.numpy(), logits.argmax(1).numpy()), 1)
    assert np.array_equal(found[0].confusion, confusion)
