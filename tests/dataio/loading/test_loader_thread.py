"""The loader's thread: errors and warnings come with their batch, and threads end with their loaders."""

import gc
import logging
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.dali_pipeline import as_images, build_pipeline, pipeline_inputs, run_pipeline
from dataio.loading.loader import Loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import TrainingOrder, evaluation_specs
from dataio.shards.shard_set import ShardSet

CPU = torch.device("cpu")
CONFIG = DataConfig(size=32, eval_crop=1.0, prefetch=4)
BATCH = 4


def opened(shards, quarantine=None, config=CONFIG):
    work = evaluation_specs(shards, config, batch=BATCH, rank=0, world=1)
    return Loader(shards, config, work, batch=BATCH, device=CPU, train=False, quarantine=quarantine)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "telltale-loader"]


def ended(patience=20.0):
    end = time.monotonic() + patience
    while loader_threads() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
    return not loader_threads()


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def damage(folder, sample_id, what):
    """Zeros (found in the header), or a table that only the decoder looks into."""
    shards = ShardSet(folder, "train")
    row, data = shards.rows[sample_id], bytearray(shards.read(sample_id).tobytes())
    if what == "header":
        data[:] = bytes(len(data))
    else:
        table = data.index(b"\xff\xc4")
        data[table + 5 : table + 21] = b"\xff" * 16
    with open(folder / shards.shards[int(row["shard"])]["file"], "rb+") as file:
        file.seek(int(row["offset"]))
        file.write(data)


def test_batches_are_those_of_one_run_of_the_pipeline_each(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    for number, batch in enumerate(opened(shards)):
        (work,) = [
            spec
            for place, spec in enumerate(evaluation_specs(shards, CONFIG, batch=BATCH, rank=0, world=1))
            if place == number
        ]
        inputs = pipeline_inputs(shards.read_many(work.ids), work.boxes, work.flips)
        config = DataConfig(size=32, eval_crop=1.0, prefetch=1)
        pipeline = build_pipeline(
            iter([inputs]), config, BATCH, CPU, resample=False, pad=False, augmented=False
        )
        assert torch.equal(as_images(run_pipeline(pipeline, None)), batch.image)
        assert batch.sample_id.tolist() == work.ids.tolist()
        if number == 5:
            break


def test_half_precision_is_the_rounding_of_single(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    work = next(evaluation_specs(shards, CONFIG, batch=BATCH, rank=0, world=1))
    found = []
    for half in (False, True):
        inputs = pipeline_inputs(shards.read_many(work.ids), work.boxes, work.flips)
        pipeline = build_pipeline(
            iter([inputs]), CONFIG, BATCH, CPU, resample=False, pad=False, augmented=False, half=half
        )
        found.append(as_images(run_pipeline(pipeline, None)).clone())
    single, half_images = found
    assert half_images.dtype == torch.float16 and torch.equal(single.half(), half_images)
    work_again = evaluation_specs(shards, CONFIG, batch=BATCH, rank=0, world=1)
    loader = Loader(shards, CONFIG, work_again, batch=BATCH, device=CPU, train=False, half=True)
    assert torch.equal(next(loader).image, single)  # of a GPU only


@pytest.mark.parametrize("what", ["header", "table"])
def test_an_error_comes_in_the_place_of_its_batch(copy, what):
    damage(copy, 5 * BATCH + 2, what)
    undamaged = opened(ShardSet(copy, "train"))
    whole = [next(undamaged).image.clone() for _ in range(5)]
    loader = opened(ShardSet(copy, "train"))
    for expected in whole:
        assert torch.equal(next(loader).image, expected)
    with pytest.raises(UserError, match="not a decodable image") as caught:
        next(loader)
    assert isinstance(caught.value.__cause__, RuntimeError if what == "table" else type(None))
    with pytest.raises(StopIteration):
        next(loader)
    assert ended()


@pytest.mark.parametrize("what", ["header", "table"])
def test_a_warning_comes_with_its_batch_in_the_thread_that_takes_it(copy, tmp_path, caplog, what):
    gone = [2 * BATCH, 5 * BATCH + 2]
    for sample_id in gone:
        damage(copy, sample_id, what)
    shards = ShardSet(copy, "train")
    loader = opened(shards, Quarantine(shards, tmp_path / "list.jsonl", 0.2))
    heard, threads = [], set()

    class Handler(logging.Handler):
        def emit(self, record):
            threads.add(record.threadName)
            heard.append(record.getMessage())

    handler = Handler()
    logging.getLogger("telltale").addHandler(handler)
    try:
        for number, batch in enumerate(loader):
            expected = [i for i in range(number * BATCH, number * BATCH + BATCH) if i not in gone]
            assert batch.sample_id.tolist() == expected[: len(batch.sample_id)]
            assert len(heard) == (number >= 2) + (number >= 5)
            if number == 7:
                break
    finally:
        logging.getLogger("telltale").removeHandler(handler)
    assert threads == {threading.current_thread().name}
    for text, sample_id, count in zip(heard, gone, (1, 2), strict=True):
        assert f"key {int(shards.rows[sample_id]['key']):09d}" in text
        assert f"It is left out ({count} of at most" in text


def test_the_cap_stops_at_the_batch_that_exceeds_it(copy, tmp_path):
    for number in (1, 3, 5):
        damage(copy, number * BATCH, "table" if number == 5 else "header")
    shards = ShardSet(copy, "train")
    loader = opened(shards, Quarantine(shards, tmp_path / "list.jsonl", 2 / len(shards)))
    assert [len(next(loader).sample_id) for _ in range(5)] == [4, 3, 4, 3, 4]
    with pytest.raises(UserError, match=r"3 samples of the train split are damaged by now"):
        next(loader)


def test_a_last_batch_of_which_nothing_is_left_warns_even_so(copy, tmp_path, caplog):
    shards = ShardSet(copy, "train")
    count = len(shards)
    last = list(range((count - 1) // BATCH * BATCH, count))
    for sample_id in last:
        damage(copy, sample_id, "header")
    loader = opened(shards, Quarantine(shards, tmp_path / "list.jsonl", 0.2))
    with caplog.at_level(logging.WARNING, "telltale"):
        assert sum(len(batch.sample_id) for batch in loader) == count - len(last)
    assert len(caplog.records) == len(last)


def test_many_loaders_leave_no_threads(tiny_shards):
    assert ended()
    shards = ShardSet(tiny_shards, "train")
    before = threading.active_count()
    for number in range(12):
        loader = opened(shards)
        assert not loader_threads()  # none before the first batch
        if number % 3 == 0:
            next(loader)  # dropped half-read
        elif number % 3 == 1:
            assert len(list(loader)) == -(-len(shards) // BATCH)
        else:
            next(loader)
            loader.close()
        del loader
        assert ended()
    assert threading.active_count() == before


def test_two_loaders_and_another_reader_share_the_shards(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    alone = [batch.image.clone() for batch in opened(shards)]
    stored = [shards.read(i).tobytes() for i in range(len(shards))]
    for first, second, expected in zip(opened(shards), opened(shards), alone, strict=True):
        assert torch.equal(first.image, expected) and torch.equal(second.image, expected)
        assert [d.tobytes() for d in shards.read_many(first.sample_id.numpy())] == [
            stored[i] for i in first.sample_id.tolist()
        ]


def test_the_order_is_the_same_for_two_threads_in_different_epochs(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    order, alone = (TrainingOrder(shards, DataConfig(size=24), 5, 16) for _ in range(2))
    steps = 4 * order.steps_per_epoch
    expected = [alone.step_ids(step).tolist() for step in range(steps)]
    found: list[list[int]] = []

    def ahead():
        for step in range(steps):
            found.append(order.step_ids(step).tolist())

    thread = threading.Thread(target=ahead)
    thread.start()
    for step in reversed(range(steps)):
        assert order.step_ids(step).tolist() == expected[step]
        order.known_objects(step)
    thread.join()
    assert found == expected


@pytest.mark.parametrize("end", ["", "raise RuntimeError('ours')"])
def test_a_process_ends_with_its_loader_half_read(tiny_shards, end):
    code = f"""
import torch
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.training_order import TrainingOrder, training_specs
from dataio.shards.shard_set import ShardSet
shards, config = ShardSet({str(tiny_shards)!r}, "train"), DataConfig(size=224, prefetch=3)
work = training_specs(TrainingOrder(shards, config, 1, 64), micro_batch=64, rank=0, world=1, first_step=0,
                      last_step=10**6)
loader = Loader(shards, config, work, batch=64, device=torch.device("cpu"), train=True)
for _ in range(3):
    next(loader)
print("taken", flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == bool(end) and done.stdout == "taken\n"
    assert done.stderr.strip().splitlines()[-1:] == (["RuntimeError: ours"] if end else [])
