"""Splits held in memory: the same batches as the DALI loader's, and what is refused."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading import in_memory
from dataio.loading.augment import AugmentConfig
from dataio.loading.config import DataConfig
from dataio.loading.in_memory import InMemoryLoader, InMemorySplit, free_memory, preload
from dataio.loading.loader import Loader
from dataio.loading.open_loader import open_loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.shards.shard_set import ShardSet

CPU = torch.device("cpu")
GREY = 1 / 255 / 0.224  # a grey level, of the channel where it is the largest


def decoded(config, shards, train=True, quarantine=None):
    if train:
        return preload(config, CPU, shards, train_quarantine=quarantine)[0]
    return InMemorySplit(shards, config, CPU, 0, quarantine)


def batches(shards, config, *, train=True, world=1, first=0, last=6, seed=7, quarantine=None):
    """Copies of all ranks' batches, held or decoded as `config.resident` says."""
    found = []
    order = TrainingOrder(shards, config, seed, 16) if train else None
    split = decoded(config, shards, train, quarantine) if config.resident else None
    for rank in range(world):
        work = (
            training_specs(order, micro_batch=4, rank=rank, world=world, first_step=first, last_step=last)
            if order
            else evaluation_specs(shards, config, batch=7, rank=rank, world=world)
        )
        loader = open_loader(
            shards,
            config,
            work,
            batch=7,
            device=CPU,
            train=train,
            quarantine=quarantine,
            in_memory=split,
        )
        assert isinstance(loader, InMemoryLoader if config.resident else Loader)
        for batch in loader:
            assert batch.image.is_contiguous(memory_format=torch.channels_last)
            assert batch.image.dtype == torch.float32 and batch.generator.dtype == torch.int64
            found.append((batch.image.clone(), batch.generator, batch.object_label, batch.sample_id))
    return found


def compared(folder, split="train", *, train=True, options=(), **settings):
    """The largest difference of a pixel between the two loaders; all else is equal."""
    pair = []
    for held in (False, True):
        config = DataConfig(**{"window_shards": 2, **settings}, resident=held)
        pair.append(batches(ShardSet(folder, split, **dict(options)), config, train=train))
    assert len(pair[0]) == len(pair[1]) > 0
    worst = 0.0
    for (image, *rest), (other, *others) in zip(*pair, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        assert image.shape == other.shape
        worst = max(worst, (image - other).abs().max().item())
    return worst


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 28, "crop": "random", "pad": 3},
        {"size": 32, "crop": "random", "pad": 4, "mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)},
        {"size": 32, "crop": "random", "flip": 0.0},
        {"size": 32, "crop": "random", "pad": 8, "crop_step": 4},
        {"size": 24, "crop": "centre", "eval_crop": 0.75},
        {"size": 24, "crop": "random", "sampling": "balanced"},
        {"size": 24, "crop": "random", "pad": 2, "augment": AugmentConfig(erase=0.6)},
    ],
    ids=["pad", "cifar", "whole", "step", "centre", "balanced", "erase"],
)
def test_training_batches_are_dalis_bit_for_bit_where_nothing_is_resampled(tiny_shards, settings):
    assert compared(tiny_shards, **settings) == 0


@pytest.mark.parametrize(
    "options", [{"generators": ["adm"]}, {"subsets": [""]}], ids=["generators", "subsets"]
)
def test_of_a_selection_only_the_selected_are_held(tiny_shards, options):
    known = ShardSet(tiny_shards, "train").labels.generators
    if "generators" in options:
        options = {"generators": [known[1]]}
    assert compared(tiny_shards, size=28, crop="random", pad=1, options=options.items()) == 0
    shards = ShardSet(tiny_shards, "train", **options)
    assert len(decoded(DataConfig(size=28), shards).pixels) == len(shards)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_batches_are_dalis_bit_for_bit(tiny_shards, world):
    config: dict[str, Any] = {"size": 24, "eval_crop": 0.75}
    pair = [
        batches(ShardSet(tiny_shards, "test"), DataConfig(**config, resident=held), train=False, world=world)
        for held in (False, True)
    ]
    assert [part.tolist() for *_, part in pair[0]] == [part.tolist() for *_, part in pair[1]]
    assert all(torch.equal(a, b) for x, y in zip(*pair, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("train", "settings"),
    [
        (True, {"size": 24, "crop": "random_resized"}),
        (True, {"size": 40, "crop": "random_resized", "scale": (0.1, 1.0)}),
        (True, {"size": 48, "crop": "random", "pad": 3}),
        (False, {"size": 24, "eval_crop": 1.0}),
        (False, {"size": 12, "eval_crop": 0.875}),
    ],
)
def test_resampled_pixels_are_within_a_grey_level_of_dalis(tiny_shards, train, settings):
    assert 0 < compared(tiny_shards, "train", train=train, **settings) <= GREY * 1.001


def test_resampling_is_the_same_under_autocast(tiny_shards):
    config = DataConfig(size=24, eval_crop=1.0, resident=True)
    shards = ShardSet(tiny_shards, "test")
    plain = batches(shards, config, train=False)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = batches(shards, config, train=False)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, mixed, strict=True))


def test_a_gpus_gather_takes_the_pixels_that_the_cpus_rows_do(tiny_shards):
    config = DataConfig(size=28, crop="random", pad=3, resident=True)
    shards = ShardSet(tiny_shards, "train")
    order = TrainingOrder(shards, config, 3, 16)
    loader = InMemoryLoader(shards, decoded(config, shards), config, iter([]), device=CPU, train=True)
    for step in range(4):
        work = order.work(step, 0, 16)
        assert 0 < work.flips.sum() < 16
        table = np.concatenate([work.ids[:, None], work.boxes, work.flips[:, None]], axis=1).T
        assert torch.equal(loader._cut(work), loader._cut_by_index(torch.from_numpy(table)))


@pytest.mark.parametrize("erase", [0.0, 0.6])
@pytest.mark.parametrize("train", [True, False])
def test_batches_are_a_function_of_their_columns(tiny_shards, train, erase):
    config = DataConfig(size=24, crop="random", eval_crop=0.75, pad=3, augment=AugmentConfig(erase=erase))
    shards = ShardSet(tiny_shards, "train")
    split = decoded(config, shards)
    if train:
        order = TrainingOrder(shards, config, 7, 16)
        specs = list(training_specs(order, micro_batch=8, rank=0, world=1, first_step=0, last_step=4))
    else:
        specs = list(evaluation_specs(shards, config, batch=20, rank=0, world=1))
    expected, by_columns = (
        InMemoryLoader(shards, split, config, iter(specs), device=CPU, train=train) for _ in range(2)
    )
    assert not by_columns.resampled
    buffer = by_columns.next_columns()
    for number, batch in enumerate(expected):
        image, generator, object_label = by_columns.gather(buffer)
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(image, batch.image) and torch.equal(generator, batch.generator)
        assert torch.equal(object_label, batch.object_label)
        assert torch.equal(buffer[0], batch.sample_id)
        if number + 1 < len(specs):
            following = by_columns.next_columns()
            buffer = buffer.copy_(following) if following.shape == buffer.shape else following
    with pytest.raises(StopIteration):
        by_columns.next_columns()


@pytest.mark.parametrize("held", [False, True])
def test_any_number_of_processes_and_any_start_give_the_same_batches(tiny_shards, held):
    config = DataConfig(size=28, crop="random", pad=3, window_shards=2, resident=held)
    shards = ShardSet(tiny_shards, "train")
    one, two = batches(shards, config), batches(shards, config, world=2)
    by_id = {tuple(ids.tolist()): image for image, *_, ids in one}
    assert len(two) == len(one)
    assert all(torch.equal(by_id[tuple(ids.tolist())], image) for image, *_, ids in two)
    later = batches(shards, config, first=4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one[16:], later, strict=True))


def test_batches_are_the_callers_own(tiny_shards):
    config = DataConfig(size=32, crop="random", resident=True, flip=0.0)
    shards = ShardSet(tiny_shards, "train")
    before = batches(shards, config)
    order = TrainingOrder(shards, config, 7, 16)
    work = training_specs(order, micro_batch=4, rank=0, world=1, first_step=0, last_step=6)
    split = decoded(config, shards)
    for batch in open_loader(shards, config, work, batch=4, device=CPU, train=True, in_memory=split):
        batch.image.fill_(torch.nan)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, batches(shards, config), strict=True))


def damaged(tiny_shards, tmp_path, split, *places):
    """A copy of the shards in which the samples' bytes (or their headers) are zeros."""
    folder = tmp_path / "shards"
    if not folder.exists():
        shutil.copytree(tiny_shards, folder)
    shards = ShardSet(folder, split)
    for number, place in enumerate(places):
        row = shards.rows[place]
        with open(folder / shards.shards[int(row["shard"])]["file"], "rb+") as file:
            file.seek(int(row["offset"]) - 512 * (number % 2))
            file.write(b"\0" * (512 if number % 2 else int(row["size"])))
    return folder


def test_damaged_samples_are_replaced_or_left_out_as_without(tiny_shards, tmp_path):
    settings: dict[str, Any] = {
        "size": 28,
        "crop": "random",
        "pad": 3,
        "eval_crop": 0.875,
        "window_shards": 2,
    }
    ids = TrainingOrder(ShardSet(tiny_shards, "train"), DataConfig(**settings), 7, 16).step_ids(1)
    folder = damaged(tiny_shards, tmp_path, "train", *ids[[1, 6, 15]].tolist())
    damaged(tiny_shards, tmp_path, "test", 2, 9)
    for train, split in ((True, "train"), (False, "test")):
        pair = []
        for held in (False, True):
            shards = ShardSet(folder, split)
            quarantine = Quarantine(shards, tmp_path / f"{held}.jsonl", 0.2)
            config = DataConfig(**settings, resident=held)
            pair.append(batches(shards, config, train=train, quarantine=quarantine))
        assert all(torch.equal(a, b) for x, y in zip(*pair, strict=True) for a, b in zip(x, y, strict=True))
    assert len((tmp_path / "True.jsonl").read_text().splitlines()) == 5


def test_a_damaged_sample_is_named_before_the_first_step(tiny_shards, tmp_path):
    shards = ShardSet(damaged(tiny_shards, tmp_path, "train", 5), "train")
    with pytest.raises(UserError, match=rf"key {int(shards.rows[5]['key']):09d} .*not a decodable image"):
        preload(DataConfig(size=28, resident=True), CPU, shards)


def test_images_of_several_sizes_are_refused(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    shards.manifest["splits"]["train"]["largest"]["width"] = 40
    with pytest.raises(
        UserError, match=r"data\.resident: the train images of .* are 32 to 40 px wide and 32 to 32 px high"
    ):
        preload(DataConfig(size=28, resident=True), CPU, shards)


def test_what_does_not_fit_is_refused_with_both_numbers(tiny_shards, monkeypatch):
    train, val = ShardSet(tiny_shards, "train"), ShardSet(tiny_shards, "val")
    needed = 2 * 3 * (len(train) * 36**2 + len(val) * 32**2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = DataConfig(size=32, crop="random", pad=2, resident=True)
    monkeypatch.setattr(in_memory, "free_memory", lambda device: needed - 1)
    told = (
        rf"{len(train)} train and {len(val)} val images in each of 2 processes need 0\.00 GiB and 0\.00 GiB"
    )
    with pytest.raises(UserError, match=told):
        preload(config, CPU, train, val)
    monkeypatch.setattr(in_memory, "free_memory", lambda device: needed)
    splits = preload(config, CPU, train, val)
    assert sum(split.pixels.nbytes for split in splits if split is not None) == needed // 2


def test_the_free_memory_is_the_systems_or_the_control_groups(tmp_path):
    assert free_memory(CPU, str(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert free_memory(CPU, str(tmp_path)) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_memory(CPU, str(tmp_path)) == 4000 * 1024
    (group / "memory.max").write_text("5000\n")
    assert free_memory(CPU, str(tmp_path)) == 4000
    assert (free_memory(CPU) or 0) > 2**20


def test_a_step_that_the_padding_is_no_multiple_of_is_refused():
    refused: list[dict[str, Any]] = [
        {"pad": 2, "crop_step": 4},
        {"crop_step": 0},
        {"crop": "centre", "crop_step": 2},
    ]
    for settings in refused:
        with pytest.raises(ValueError, match=r"data\.crop_step is \d"):
            DataConfig(**{"crop": "random", **settings})


@pytest.mark.parametrize("knob", [{"jpeg": 0.5}, {"rand_augment": 2}, {"webp": 0.1}])
def test_augmentation_that_only_dali_does_is_refused(knob):
    with pytest.raises(ValueError, match=rf"data\.augment\.{next(iter(knob))} is .*set data\.resident false"):
        DataConfig(resident=True, augment=AugmentConfig(**knob))
