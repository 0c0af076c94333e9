r"""Measure what the order of samples costs at scale: start of an epoch, memory, quality of the shuffle.

    python launch/scaling.py --samples 2700000 --samples-per-shard 1000 --ranks 8
    python launch/scaling.py --samples 10000000000 --samples-per-shard 10000 --ranks 4096 --output scaling.json

The code that training runs is measured, for one rank; no image is read. --whole makes a shard folder
of sparse files (its index is written in full: 40 bytes a sample) and measures all that a process does
before its first step: manifest, sizes of all files, index, order, crops.
"""

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from dataio.atomic import write_text
from dataio.codec import preset_policy
from dataio.errors import UserError
from dataio.index import MANIFEST_FORMAT, SAMPLE
from dataio.order import EpochOrder
from engines.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Measure what the order of samples costs at scale.")
    add = parser.add_argument
    add("--samples", type=int, default=2_700_000, help="in the training split")
    add("--samples-per-shard", type=int, default=1000)
    add("--window-shards", type=int, default=16, help="data.window_shards")
    add("--ranks", type=int, default=8, help="processes")
    add("--per-rank", type=int, default=256, help="images of a rank in a step")
    add(
        "--whole", default=None, metavar="FOLDER", help="make a folder of sparse shards there and open it too"
    )
    add("--output", default=None, help="JSON file of the figures")
    args = parser.parse_args(argv)
    for name in ("samples", "samples_per_shard", "window_shards", "ranks", "per_rank"):
        if args[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {args[name]}, expected at least 1")
    if args.samples < args.samples_per_shard:
        parser.error(f"--samples is {args.samples}, expected at least --samples-per-shard")
    before = _peak_mib()
    sizes = np.full(args.samples // args.samples_per_shard, args.samples_per_shard, np.int64)
    begin = time.perf_counter()
    order = EpochOrder(sizes, 0, 0, args.window_shards)
    made = time.perf_counter() - begin
    batch = min(args.ranks * args.per_rank, len(order))
    ids = order.ids(0, batch)  # the first step's, from which a rank takes its slice
    started = time.perf_counter() - begin
    shards = ids // args.samples_per_shard
    found = {
        "samples": len(order),
        "shards": len(sizes),
        "order_seconds": made,
        "first_step_seconds": started,
        "memory_mib": _peak_mib() - before,
        "index_bytes": SAMPLE.itemsize * len(order),
        "shards_in_first_step": len(np.unique(shards)),
        # Of a full permutation it would be one over the number of shards.
        "neighbours_of_one_shard": float(np.mean(shards[1:] == shards[:-1])),
    }
    if args.whole is not None:
        found |= _whole_start(Path(args.whole), args)
    for name, value in found.items():
        print(f"{name:26}{value:>18,.6g}")
    if args.output:
        write_text(Path(args.output), json.dumps(found, indent=1) + "\n")
    return 0


def _whole_start(folder: Path, args: Any) -> dict[str, float]:
    from dataio.index import ShardSet
    from dataio.loader import DataConfig, TrainingOrder

    # In a process of its own, whose memory is not counted.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_sparse, args=(folder, args.samples // args.samples_per_shard, args.samples_per_shard)
    )
    writer.start()
    writer.join()
    if writer.exitcode != 0:
        raise UserError(f"--whole {folder}: could not be written; choose a folder on a disk with room")
    before, begin = _peak_mib(), time.perf_counter()
    shards = ShardSet(folder, "train")
    opened = time.perf_counter() - begin
    batch = min(args.ranks * args.per_rank, len(shards))
    order = TrainingOrder(shards, DataConfig(window_shards=args.window_shards), 0, batch)
    order.work(0, 0, min(args.per_rank, batch))
    return {
        "open_seconds": opened,
        "whole_start_seconds": time.perf_counter() - begin,
        "whole_start_memory_mib": _peak_mib() - before,
    }


def write_sparse(folder: Path, shards: int, samples: int) -> None:
    """Write a shard folder whose tars are holes: a manifest and a whole index, but no images."""
    train, size = folder / "train", 20_000
    train.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(shards * samples, SAMPLE)
    rows["shard"] = np.repeat(np.arange(shards), samples)
    rows["offset"] = np.tile(512 + np.arange(samples, dtype=np.int64) * (size + 1024), shards)
    rows["size"], rows["width"], rows["height"] = size, 256, 256
    rows["generator"], rows["key"] = np.arange(len(rows)) % 2, np.arange(len(rows))
    np.save(train / "index.npy", rows)
    described = []
    for number in range(shards):
        name = f"train/{number:06d}"
        for suffix, length in ((".tar", samples * (size + 1024) + 1024), (".idx", 0)):
            with open(folder / f"{name}{suffix}", "wb") as file:
                file.truncate(length)
        described.append(
            {
                "file": f"{name}.tar",
                "samples": samples,
                "bytes": samples * (size + 1024) + 1024,
                "sha256": "0" * 64,
                "idx_bytes": 0,
                "idx_sha256": "0" * 64,
            }
        )
    index = {"file": "train/index.npy", "bytes": (train / "index.npy").stat().st_size, "sha256": "0" * 64}
    split = {
        "samples": len(rows),
        "generators": {"nature": len(rows) - len(rows) // 2, "adm": len(rows) // 2},
        "objects_known": len(rows),
        "largest": {"width": 256, "height": 256, "bytes": size},
        "index": index,
        "shards": described,
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": 1,
        "layout": "genimage",
        "generators": ["nature", "adm"],
        "objects": ["thing"],
        "subsets": ["all"],
        "codec": preset_policy("default", 256).to_dict(),
        "splits": {"train": split},
    }
    write_text(folder / "manifest.json", json.dumps(manifest))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    run_command(main)
