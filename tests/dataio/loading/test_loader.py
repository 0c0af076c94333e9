"""The loader on the real DALI: pixels, labels, coverage, and damage that is named."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.shards.shard_set import ShardSet

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def normalised(shards, sample_id, config):
    """The whole image as Pillow sees it, float [H, W, 3]."""
    with Image.open(io.BytesIO(shards.read(sample_id).tobytes())) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    return (pixels - 255 * np.array(config.mean)) / (255 * np.array(config.std))


def evaluation(shards, config, batch, rank=0, world=1):
    work = evaluation_specs(shards, config, batch=batch, rank=rank, world=world)
    return list(Loader(shards, config, work, batch=batch, device=CPU, train=False))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_evaluation_visits_every_sample_once(tiny_shards, world, batch):
    shards = ShardSet(tiny_shards, "test")
    found: list[int] = []
    for rank in range(world):
        for loaded in evaluation(shards, DataConfig(size=32), batch, rank, world):
            found += loaded.sample_id.tolist()
    assert found == list(range(len(shards)))


def test_evaluation_without_resampling_gives_pillows_pixels_and_the_indexs_labels(tiny_shards):
    shards, config = ShardSet(tiny_shards, "test"), DataConfig(size=24, eval_crop=0.75)
    for batch in evaluation(shards, config, 7):
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        assert batch.image.shape[1:] == (3, 24, 24) and batch.image.dtype == torch.float32
        for row, sample_id in enumerate(batch.sample_id.tolist()):
            expected = normalised(shards, sample_id, config)[4:28, 4:28]
            np.testing.assert_allclose(batch.image[row].permute(1, 2, 0), expected, atol=1e-5)
            assert batch.generator[row] == shards.rows["generator"][sample_id]
            assert batch.object_label[row] == shards.rows["object"][sample_id]


def test_training_crops_are_the_boxes_of_the_order_flipped_and_padded(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    config = DataConfig(size=28, crop="random", pad=3, flip=0.5, window_shards=2)
    order = TrainingOrder(shards, config, 5, 16)
    work = list(training_specs(order, micro_batch=8, rank=1, world=2, first_step=3, last_step=5))
    batches = list(Loader(shards, config, iter(work), batch=8, device=CPU, train=True))
    assert len(batches) == 2
    flipped = 0
    for batch, part in zip(batches, work, strict=True):
        assert batch.sample_id.tolist() == part.ids.tolist()
        for row in range(8):
            padded = np.pad(normalised(shards, int(part.ids[row]), config), ((3, 3), (3, 3), (0, 0)))
            y, x, h, w = part.boxes[row] + (3, 3, 0, 0)
            expected = padded[y : y + h, x : x + w]
            flipped += int(part.flips[row])
            expected = expected[:, ::-1] if part.flips[row] else expected
            # The padding is the mean colour in whole grey levels.
            np.testing.assert_allclose(batch.image[row].permute(1, 2, 0), expected, atol=0.02)
    assert 0 < flipped < 16


def test_batches_do_not_depend_on_threads_prefetch_or_start(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    seen = []
    for threads, prefetch, first in ((1, 1, 0), (3, 4, 2)):
        config = DataConfig(size=24, crop="random_resized", threads=threads, prefetch=prefetch)
        order = TrainingOrder(shards, config, 1, 16)
        work = training_specs(order, micro_batch=4, rank=0, world=1, first_step=first, last_step=4)
        seen.append([batch.image for batch in Loader(shards, config, work, batch=4, device=CPU, train=True)])
    assert len(seen[0]) == 16 and len(seen[1]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[0][8:], seen[1], strict=True))


def test_batches_outlive_the_next_ones(tiny_shards):
    shards, config = ShardSet(tiny_shards, "train"), DataConfig(size=32, eval_crop=1.0)
    work = evaluation_specs(shards, config, batch=4, rank=0, world=1)
    held = [
        (b.image, b.image.clone()) for b in Loader(shards, config, work, batch=4, device=CPU, train=False)
    ]
    assert all(torch.equal(kept, copied) for kept, copied in held)


def test_subsets_select_and_unknown_ones_are_named(tiny_shards):
    with pytest.raises(UserError, match=r"no subset 'x'.*data\.subsets"):
        ShardSet(tiny_shards, "train", subsets=["x"])
    assert len(ShardSet(tiny_shards, "train", subsets=[""])) == len(ShardSet(tiny_shards, "train"))


def test_an_epoch_smaller_than_a_batch_is_an_error(tiny_shards):
    with pytest.raises(UserError, match=r"less than one train\.global_batch of 4096; lower it"):
        TrainingOrder(ShardSet(tiny_shards, "train"), DataConfig(), 0, 4096)


def damage(folder, kind):
    tar, idx = folder / "train" / "000001.tar", folder / "train" / "000001.idx"
    if kind == "truncated tar":
        tar.write_bytes(tar.read_bytes()[:-512])
        return tar
    if kind == "missing tar":
        tar.unlink()
        return tar
    if kind == "stale index":
        idx.write_text(idx.read_text() + "jpg 1 2 x\n")
        return idx
    if kind == "changed sample index":
        path = folder / "train" / "index.npy"
        path.write_bytes(path.read_bytes() + b"0")
        return path
    data = bytearray(tar.read_bytes())
    data[600] ^= 255
    tar.write_bytes(data)
    return tar


@pytest.mark.parametrize("kind", ["truncated tar", "missing tar", "stale index", "changed sample index"])
def test_damaged_files_are_named_before_the_first_step(copy, kind):
    path = damage(copy, kind)
    with pytest.raises(UserError, match=str(path)):
        ShardSet(copy, "train")


def test_a_flipped_bit_is_found_with_verify(copy):
    path = damage(copy, "flipped bit")
    ShardSet(copy, "train")
    with pytest.raises(UserError, match=f"{path}: its SHA-256 is not the manifest's"):
        ShardSet(copy, "train", verify=True)


def test_an_undecodable_image_is_named_by_shard_and_key(copy):
    shards = ShardSet(copy, "test")
    row = shards.rows[5]
    path = copy / shards.shards[row["shard"]]["file"]
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) : int(row["offset"]) + int(row["size"])] = bytes(int(row["size"]))
    path.write_bytes(data)
    where = rf"000000\.tar key {int(row['key']):09d} \(byte {int(row['offset'])}, from .*\.\w+\)"
    with pytest.raises(UserError, match=rf"{where}: not a decodable image"):
        evaluation(ShardSet(copy, "test"), DataConfig(size=32), 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("{", "cannot be read"),
        (json.dumps({"format": "other"}), "format is 'other'"),
        (json.dumps({"format": "telltale-shards", "version": 9}), "version 9"),
    ],
)
def test_other_manifests_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ShardSet(tmp_path, "train")


def test_missing_folders_and_splits_are_named(tiny_shards, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder of shards; write one with"):
        ShardSet(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no split 'dev'; there are train, val, test"):
        ShardSet(tiny_shards, "dev")


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 8])
def test_the_ranks_parts_of_a_step_are_the_whole_step_in_order(tiny_shards, world):
    order = TrainingOrder(ShardSet(tiny_shards, "train"), DataConfig(size=24), 5, 32)
    parts = [
        list(training_specs(order, micro_batch=4, rank=rank, world=world, first_step=1, last_step=2))
        for rank in range(world)
    ]
    assert all(parts)
    ids = np.concatenate([spec.ids for part in parts for spec in part])
    np.testing.assert_array_equal(ids, order.step_ids(1))
