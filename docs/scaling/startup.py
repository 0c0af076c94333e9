r"""The start of one process of a run on a very large data set: time and memory before its first step.

    python docs/scaling/startup.py FOLDER --samples 2700000 --samples-per-shard 1000 --ranks 8
    python docs/scaling/startup.py FOLDER --samples 10000000000 --samples-per-shard 10000 --ranks 4096

Makes a set of sparse files with a manifest, a table of shards and an index as the sharder writes
them. Only what the measured process reads has content: the index's rows of the windows that the
first steps come from, and the tars of its own part of the first step, with the headers of the
members it reads.
"""

import argparse
import json
import multiprocessing
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
from numpy.typing import NDArray

from dataio.core.atomic import write_text
from dataio.images.codec import preset_policy
from dataio.loading.config import DataConfig
from dataio.loading.order import EpochOrder
from dataio.loading.training_order import TrainingOrder
from dataio.shards import shard_set, shard_table
from dataio.shards.manifest import MANIFEST_FORMAT, SAMPLE, sha256_of
from dataio.shards.paged_index import PAGE
from dataio.shards.shard_set import ShardSet
from dataio.shards.shard_table import ENTRY
from engines.train.schedule import data_fingerprint

_SIZE, _EVERY = 20_000, 21_024  # bytes of an image, and from one to the next in its tar
_STEPS = 4  # whose cost is measured after the first


@dataclass(frozen=True)
class Scale:
    """How large the run is: full shards, processes, images of a process in a step, the order's window."""

    shards: int
    samples_per_shard: int
    window_shards: int
    ranks: int
    per_rank: int

    @property
    def samples(self) -> int:
        return self.shards * self.samples_per_shard

    @property
    def global_batch(self) -> int:
        return min(self.ranks * self.per_rank, self.samples)

    @property
    def own(self) -> tuple[int, int]:
        """The last process's part of a global batch."""
        return max(0, self.global_batch - self.per_rank), self.global_batch


def measure_start(folder: Path, scale: Scale) -> dict[str, float]:
    """Make the set and open it, each in a process of its own.

    Returns:
        seconds until the set is open, until the order and the crops of the first step are known,
        until its images are read (whole_start_seconds, and the processor's time of it); the memory
        this added in MiB; the processor's time for crops and the count of known objects of a later step.

    Raises:
        SystemExit: the set cannot be written.
    """
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_sparse, args=(folder, scale))
    writer.start()
    writer.join()
    if writer.exitcode != 0:
        raise SystemExit(f"{folder}: cannot be written; choose a folder on a disk with room")
    with context.Pool(1) as pool:
        return pool.apply(_start, (folder, scale))


def _start(folder: Path, scale: Scale) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, begin, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    shards = ShardSet(folder, "train")
    opened = time.perf_counter() - begin
    data_fingerprint(shards)
    shards.image_sizes()
    order = TrainingOrder(shards, DataConfig(window_shards=scale.window_shards), 0, scale.global_batch)
    work = order.work(0, *scale.own)
    ordered = time.perf_counter() - begin
    shards.read_many(work.ids)
    order.known_objects(0)
    started, memory = time.perf_counter() - begin, _peak_mib() - before
    worked = time.process_time() - cpu
    steps = min(_STEPS, order.steps_per_epoch - 1)
    begin = time.process_time()
    for step in range(1, 1 + steps):
        order.work(step, *scale.own)
    middle = time.process_time()
    for step in range(1, 1 + steps):
        order.known_objects(step)
    end = time.process_time()
    return {
        "open_seconds": opened,
        "order_and_crops_seconds": ordered,
        "whole_start_seconds": started,
        "whole_start_cpu_seconds": worked,
        "whole_start_memory_mib": memory,
        "step_cpu_seconds_crops": (middle - begin) / max(1, steps),
        "step_cpu_seconds_counts": (end - middle) / max(1, steps),
    }


def _peak_mib() -> float:
    # Not getrusage's: that one outlives the exec of this program.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


# ---- the sparse set ---------------------------------------------------------------------------


def write_sparse(folder: Path, scale: Scale) -> None:
    """Write the set, see above; with few shards all tars exist, without content."""
    train, per_shard = folder / "train", scale.samples_per_shard
    train.mkdir(parents=True, exist_ok=True)
    tar_bytes = per_shard * _EVERY + 1024
    order = EpochOrder(np.full(scale.shards, per_shard, np.int64), 0, 0, scale.window_shards)
    last = order.window_at(min((1 + _STEPS) * scale.global_batch, scale.samples) - 1)
    windows = np.concatenate([order.window(number) for number in range(last + 1)])
    around = -(-PAGE // per_shard)  # pages reach into the neighbours
    windows = np.unique(np.concatenate([windows + step for step in range(-around, around + 1)]))
    windows = windows[(windows >= 0) & (windows < scale.shards)]
    few = scale.samples <= shard_set.CHECKED_ON_OPEN  # every row of those is validated
    _write_index(train / "index.npy", scale, np.arange(scale.shards) if few else windows)
    tabled = scale.shards >= shard_table.TABLE_FROM
    own = order.ids(*scale.own)
    for number in np.unique(own // per_shard) if tabled else range(scale.shards):
        for suffix, length in ((".tar", tar_bytes), (".idx", 0)):
            with open(train / f"{number:06d}{suffix}", "wb") as file:
                file.truncate(length)
    for sample_id in own.tolist():
        shard, place = divmod(sample_id, per_shard)
        info = tarfile.TarInfo(f"{sample_id:09d}.jpg")
        info.size = _SIZE
        with open(train / f"{shard:06d}.tar", "rb+") as file:
            file.seek(place * _EVERY)
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
    entries = np.zeros(scale.shards, ENTRY)
    entries["number"], entries["samples"], entries["bytes"] = np.arange(scale.shards), per_shard, tar_bytes
    entries["sha256"] = np.random.default_rng(0).integers(0, 256, (scale.shards, 32), np.uint8)
    split: dict[str, Any] = {
        "samples": scale.samples,
        "generators": {"nature": scale.samples - scale.samples // 2, "adm": scale.samples // 2},
        "objects_known": scale.samples - scale.samples // 3,
        "smallest": {"width": 256, "height": 256},
        "largest": {"width": 256, "height": 256, "bytes": _SIZE},
        # A start does not check the index's digest.
        "index": {
            "file": "train/index.npy",
            "bytes": (train / "index.npy").stat().st_size,
            "sha256": "0" * 64,
        },
    }
    if tabled:
        path = train / shard_table.TABLE
        np.save(path, entries)
        facts = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "shards": scale.shards}
        split["table"] = {"file": f"train/{shard_table.TABLE}", **facts}
    else:
        split["shards"] = [shard_table.described("train", entry) for entry in entries]
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": 2 if tabled else 1,
        "layout": "genimage",
        "generators": ["nature", "adm"],
        "objects": ["thing"],
        "subsets": ["all"],
        "codec": preset_policy("default", 256).to_dict(),
        "splits": {"train": split},
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


def _write_index(path: Path, scale: Scale, shards: NDArray[np.int64]) -> None:
    """An index of which only the rows of these shards are written."""
    rows = np.zeros(scale.samples_per_shard, SAMPLE)
    places = np.arange(len(rows), dtype=np.int64)
    rows["offset"], rows["size"] = 512 + places * _EVERY, _SIZE
    rows["width"], rows["height"] = 256, 256
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (scale.samples,)})
        begin = file.tell()
        for shard in shards.tolist():
            rows["shard"], rows["key"] = shard, shard * len(rows) + places
            rows["generator"] = rows["key"] % 2
            rows["object"] = -(rows["key"] % 3 == 0).astype(np.int32)
            file.seek(begin + shard * rows.nbytes)
            file.write(rows.tobytes())
        file.truncate(begin + scale.samples * SAMPLE.itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the set of sparse files is made")
    parser.add_argument("--samples", type=int, default=2_700_000, help="in the training split")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--window-shards", type=int, default=16, help="data.window_shards")
    parser.add_argument("--ranks", type=int, default=8, help="processes")
    parser.add_argument("--per-rank", type=int, default=256, help="images of a rank in a step")
    args = parser.parse_args()
    shards = args.samples // args.samples_per_shard
    scale = Scale(shards, args.samples_per_shard, args.window_shards, args.ranks, args.per_rank)
    for name, value in measure_start(args.folder, scale).items():
        print(f"{name:30}{value:>18,.6g}")


if __name__ == "__main__":
    main()
