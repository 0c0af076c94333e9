"""Node-local copies: the same bytes, whatever happens to copies, processes and the disk."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.training_order import TrainingOrder, training_specs
from dataio.shards.local_cache import CacheOptions, ShardCache
from dataio.shards.shard_set import ShardSet
from tests.support import environment

PATIENCE = 120.0  # seconds until a test gives up on another process


def opened(shards, cache, gib=0.0, split="train"):
    return ShardSet(shards, split, cache=CacheOptions(cache, gib))


def contents(shards):
    return [shards.read(i).tobytes() for i in range(len(shards))]


def everything(shards):
    shards.tars.cache.plan(range(len(shards.shards)))
    assert shards.tars.cache.wait(PATIENCE)
    return shards


def names(cache):
    return sorted(path.name for path in Path(cache).iterdir() if path.name != ".lock")


def digests(shards):
    return sorted(f"{entry['sha256']}.tar" for entry in shards.shards)


@pytest.fixture
def copy(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


WORKER = """
import sys
from dataio.shards.local_cache import CacheOptions
from dataio.shards.shard_set import ShardSet
shards = ShardSet(sys.argv[1], "train", cache=CacheOptions(sys.argv[2], float(sys.argv[3])))
cache = shards.tars.cache
cache.plan(range(len(shards.shards)))
whole = sys.argv[4] == "all"
assert not whole or cache.wait(120)
print("ready", flush=True)
if sys.argv[4] == "full":
    assert not cache.wait(3)
if sys.argv[4] == "hold":
    cache.wait(120)
    print("held", len(cache._held), flush=True)
    sys.stdin.read()
plain = ShardSet(sys.argv[1], "train")
assert all(shards.read(i).tobytes() == plain.read(i).tobytes() for i in range(len(plain)))
"""


def start(shards, cache, what, gib=0.0, prefix=()):
    words = [*prefix, sys.executable, "-c", WORKER, str(shards), str(cache), str(gib), what]
    return subprocess.Popen(
        words,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_is_read_comes_from_the_copies(copy, tmp_path):
    plain = contents(ShardSet(copy, "train"))
    shards = everything(opened(copy, tmp_path / "cache"))
    assert names(tmp_path / "cache") == digests(shards)
    for entry in shards.shards:
        (copy / entry["file"]).unlink()
    assert contents(shards) == plain


def test_a_shard_without_a_copy_is_read_from_its_folder(tiny_shards, tmp_path):
    shards = opened(tiny_shards, tmp_path / "cache")
    assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
    assert shards.tars.cache.wait(PATIENCE)  # asking for a shard is enough to have it copied
    assert names(tmp_path / "cache") == digests(shards)


def test_two_processes_fill_one_folder_together(tiny_shards, tmp_path):
    workers = [start(tiny_shards, tmp_path / "cache", "all") for _ in range(3)]
    for worker in workers:
        _, told = worker.communicate(timeout=PATIENCE)
        assert worker.returncode == 0 and told == ""
    assert names(tmp_path / "cache") == digests(ShardSet(tiny_shards, "train"))


def test_a_process_killed_in_the_middle_of_a_copy_leaves_nothing_in_the_way(copy, tmp_path):
    entry = ShardSet(copy, "train").shards[0]
    tar, kept = copy / entry["file"], copy / "kept"
    temporary = tmp_path / "cache" / f".{entry['sha256']}.tar.tmp"
    worker = start(
        copy, tmp_path / "cache", "hold", prefix=(sys.executable, "-c", PIPED, str(tar), str(kept))
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (temporary.exists() and temporary.stat().st_size == entry["bytes"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (tmp_path / "cache" / f"{entry['sha256']}.tar").exists()
    finally:
        worker.kill()
        worker.communicate(timeout=PATIENCE)
    tar.unlink()
    os.replace(kept, tar)
    assert temporary.exists()
    shards = everything(opened(copy, tmp_path / "cache"))
    assert names(tmp_path / "cache") == digests(shards)
    assert contents(shards) == contents(ShardSet(copy, "train"))


# Once the set is open, its first tar becomes a pipe to which nobody writes: the copy stands still.
PIPED = """
import os, sys
tar, kept, code, *words = sys.argv[1], sys.argv[2], *sys.argv[5:]
import dataio.shards.shard_set
opened = dataio.shards.shard_set.ShardSet.__init__
def init(self, *args, **kwargs):
    opened(self, *args, **kwargs)
    os.replace(tar, kept)
    os.mkfifo(tar)
    self.writer = os.open(tar, os.O_RDWR)
dataio.shards.shard_set.ShardSet.__init__ = init
sys.argv = ["-c", *words]
exec(code)
"""


def test_a_cap_below_the_set_evicts_the_longest_unused_and_reads_the_same(tiny_shards, tmp_path):
    sizes = [entry["bytes"] for entry in ShardSet(tiny_shards, "train").shards]
    cap = sorted(sizes)[-1] + sorted(sizes)[-2]
    assert cap < sum(sizes)
    shards = opened(tiny_shards, tmp_path / "cache", cap / 2**30)
    plain = ShardSet(tiny_shards, "train")
    taken = []
    for number in range(len(sizes)):
        shards.tars.cache.plan([number])
        assert shards.tars.cache.wait(PATIENCE)
        for i in np.flatnonzero(plain.rows["shard"] == number):
            assert shards.read(int(i)).tobytes() == plain.read(int(i)).tobytes()
        taken.append(sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")))
        time.sleep(0.01)  # apart in time of use
    assert max(taken) <= cap
    last = f"{shards.shards[-1]['sha256']}.tar"
    assert last in names(tmp_path / "cache")
    assert f"{shards.shards[0]['sha256']}.tar" not in names(tmp_path / "cache")


def test_what_another_process_uses_is_not_evicted(tiny_shards, tmp_path):
    sizes = [entry["bytes"] for entry in ShardSet(tiny_shards, "train").shards]
    cap = (sum(sizes) + 1) / 2**30
    worker = start(tiny_shards, tmp_path / "cache", "hold", cap)
    try:
        assert worker.stdout.readline() == "ready\n"
        assert worker.stdout.readline() == f"held {len(sizes)}\n"
        before = names(tmp_path / "cache")
        other = opened(tiny_shards, tmp_path / "cache", cap, split="test")
        other.tars.cache.plan(range(len(other.shards)))
        assert not other.tars.cache.wait(2.5)  # full: there is nothing to wait for
        assert contents(other) == contents(ShardSet(tiny_shards, "test"))
        assert names(tmp_path / "cache") == before
        worker.send_signal(signal.SIGKILL)
        worker.wait(PATIENCE)
        assert other.tars.cache.wait(PATIENCE)  # a lock ends with its process
    finally:
        worker.kill()
        worker.communicate(timeout=PATIENCE)


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_copy_is_made_again(damage, tiny_shards, tmp_path, capfd):
    first = everything(opened(tiny_shards, tmp_path / "cache"))
    path = tmp_path / "cache" / f"{first.shards[1]['sha256']}.tar"
    good = path.read_bytes()
    first.tars.cache.plan([])
    middle = len(good) // 2
    bad = {"flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "short": good[:-512]}
    path.write_bytes(bad.get(damage, b""))
    shards = everything(opened(tiny_shards, tmp_path / "cache"))
    assert path.read_bytes() == good
    assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
    told = capfd.readouterr().err
    assert f"{path.name} is removed (its SHA-256 is not the manifest's; it is copied again)" in told


def test_a_copy_that_fails_while_it_is_read_is_made_again(tiny_shards, tmp_path):
    shards = everything(opened(tiny_shards, tmp_path / "cache"))
    path = tmp_path / "cache" / f"{shards.shards[0]['sha256']}.tar"
    os.truncate(path, 1000)
    assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
    shards.read(0)
    assert shards.tars.cache.wait(PATIENCE)
    assert path.stat().st_size == shards.shards[0]["bytes"]


def test_a_shard_that_is_not_the_manifests_is_named_and_not_kept(copy, tmp_path, capfd):
    shards = opened(copy, tmp_path / "cache")
    entry = shards.shards[0]
    data = bytearray((copy / entry["file"]).read_bytes())
    data[int(shards.rows["offset"][0]) + 100] ^= 4
    (copy / entry["file"]).write_bytes(data)
    everything(shards)
    assert f"{entry['sha256']}.tar" not in names(tmp_path / "cache")
    assert f"{entry['file']} is not copied (its SHA-256 is not the manifest's)" in capfd.readouterr().err
    with pytest.raises(UserError, match=rf"{entry['file']} key .*: the tar's SHA-256 is not the manifest's"):
        shards.read(0)


def test_on_a_full_disk_training_reads_on_and_it_is_said_once(tiny_shards, tmp_path):
    # A file system of 64 KiB of its own, in a namespace of its own.
    shell = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"']
    (tmp_path / "small").mkdir()
    if shutil.which("unshare") is None or subprocess.run([*shell, tmp_path / "small", "true"]).returncode:
        pytest.skip(
            "needs to mount a small tmpfs: allow user namespaces (util-linux's unshare -rm), or be root"
        )
    worker = start(
        tiny_shards, tmp_path / "small" / "cache", "full", prefix=(*shell, str(tmp_path / "small"))
    )
    _, told = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0, told
    assert told.count("is full") == 1


def test_a_folder_that_cannot_be_written_is_an_error(tiny_shards, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir .*: cannot be written"):
        opened(tiny_shards, tmp_path / "file" / "cache")


def test_the_order_announces_its_window_and_the_next_one(tiny_shards, tmp_path):
    shards = opened(tiny_shards, tmp_path / "cache")
    order = TrainingOrder(shards, DataConfig(size=32, window_shards=2), 3, 8)
    cache = shards.tars.cache
    steps = order.steps_per_epoch * 2
    for step in range(steps):
        read = set()
        for work in training_specs(
            order, micro_batch=8, rank=0, world=1, first_step=step, last_step=step + 1
        ):
            read |= set(shards.rows["shard"][work.ids].tolist())
        assert read <= set(cache._planned) and len(cache._planned) <= 4
    assert isinstance(cache, ShardCache)


def test_a_process_announces_the_windows_of_its_own_part_of_a_large_step(tiny_shards, tmp_path):
    for rank in range(3):
        shards = opened(tiny_shards, tmp_path / f"cache{rank}")
        assert shards.tars.cache is not None
        order = TrainingOrder(shards, DataConfig(size=32, window_shards=1), 3, 48)
        before: set[int] = set(range(len(shards.shards)))
        for step in range(order.steps_per_epoch * 2):
            works = list(
                training_specs(order, micro_batch=16, rank=rank, world=3, first_step=step, last_step=step + 1)
            )
            read = shards.rows[np.concatenate([work.ids for work in works])]["shard"].tolist()
            planned = shards.tars.cache._planned
            assert set(read) <= set(planned) and len(planned) <= len(set(read)) + 1
            assert read[0] in before  # its copy was begun in time
            before = set(planned)
