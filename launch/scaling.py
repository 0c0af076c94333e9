r"""Measure what the order of samples costs at scale: start of an epoch, memory, quality of the shuffle.

    python launch/scaling.py --samples 2700000 --samples-per-shard 1000 --ranks 8
    python launch/scaling.py --samples 10000000000 --samples-per-shard 10000 --ranks 4096 --output scaling.json

The code that training runs is measured, for one rank. --whole makes a shard folder of sparse files and
measures all that a process does before its first step: manifest, index, order, crops, and the bytes
of its first images. --shuffle compares the two-level shuffle with full permutations.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from dataio.core.atomic import write_text
from dataio.loading.order import EpochOrder
from dataio.shards.manifest import SAMPLE
from engines.benchmark.scale_shuffle import compare_shuffles, shuffle_table
from engines.benchmark.scale_startup import Scale, measure_whole_start
from engines.config.parser import Parser
from engines.runtime.command import run_command

_MOST_SHUFFLED = 20_000_000


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
    add(
        "--shuffle",
        action="store_true",
        help="how good the shuffle is with several windows, on labels made up",
    )
    add("--output", default=None, help="JSON file of the figures")
    args = parser.parse_args(argv)
    for name in ("samples", "samples_per_shard", "window_shards", "ranks", "per_rank"):
        if args[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {args[name]}, expected at least 1")
    if args.samples < args.samples_per_shard:
        parser.error(f"--samples is {args.samples}, expected at least --samples-per-shard")
    if args.shuffle and args.samples > _MOST_SHUFFLED:
        parser.error(
            f"--shuffle --samples {args.samples}, expected at most {_MOST_SHUFFLED}: it holds whole epochs"
        )
    before = _peak_mib()
    sizes = np.full(args.samples // args.samples_per_shard, args.samples_per_shard, np.int64)
    begin = time.perf_counter()
    order = EpochOrder(sizes, 0, 0, args.window_shards)
    made = time.perf_counter() - begin
    batch = min(args.ranks * args.per_rank, len(order))
    ids = order.ids(0, batch)  # the first step's, from which a rank takes its slice
    started = time.perf_counter() - begin
    shards = ids // args.samples_per_shard
    found: dict[str, Any] = {
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
        scale = Scale(len(sizes), args.samples_per_shard, args.window_shards, args.ranks, args.per_rank)
        found |= measure_whole_start(Path(args.whole), scale)
    for name, value in found.items():
        print(f"{name:30}{value:>18,.6g}")
    if args.shuffle:
        batch = min(args.ranks * args.per_rank, args.samples)
        found["shuffle"] = compare_shuffles(len(sizes), args.samples_per_shard, batch)
        print(shuffle_table(found["shuffle"]))
    if args.output:
        write_text(Path(args.output), json.dumps(found, indent=1) + "\n")
    return 0


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    run_command(main)
