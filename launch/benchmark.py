r"""Measure telltale beside the usual ways of doing the same, on this machine.

    python launch/benchmark.py all --output docs/benchmarks/NAME.json
    python launch/benchmark.py load train --device cuda --repeats 5
    python launch/benchmark.py all --tiny
    python launch/benchmark.py load --compare docs/benchmarks/NAME.json
    python launch/benchmark.py shard-memory predict-memory --files 1000,10000,100000
    python launch/benchmark.py gpu-goals --device cuda --workers 16 --batch 256 --images 3000 --output goals.json

Cases of a group run turn about, each in its own process, after one cold run. Prints a Markdown
table; --output also writes JSON. With --compare, a median that fell by more than --tolerance ends
the command with code 1. gpu-goals runs tests/gpu and what the project's goals speak of, in at most
ten minutes, and ends with code 1 where a floor is missed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.config.parser import Parser, parse_int_list
from engines.runtime.command import run_command

NAMES = (
    *("shard", "read", "decode", "load", "load-small", "step", "train", "eval"),
    *("scaling", "checkpoint", "finetune", "finetune-full"),
)

APART = ("worth",)  # groups that `all` leaves out
MEMORY = ("shard-memory", "predict-memory")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Measure telltale beside the usual ways of doing the same.")
    add = parser.add_argument
    every = ", ".join((*NAMES, *APART))
    kinds = f"all (but {', '.join(APART)}); some of {every}; some of {', '.join(MEMORY)}; or gpu-goals"
    add("groups", nargs="+", help=kinds)
    add("--files", default="1000,10000", help="shard-memory, predict-memory: numbers of tiny files")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where loading and training compute")
    add("--data", default="data/benchmark", help="folder of the images, drawn here where missing")
    add("--repeats", type=int, default=3, help="timed runs of each case")
    add("--seconds", type=float, default=1.5, help="least time of a run")
    add("--workers", type=int, default=2, help="processes or threads of each case")
    add("--batch", type=int, default=64, help="images in a batch (training on a CPU: at most 32)")
    add("--images", type=int, default=600, help="images of 256 px to draw")
    add("--small", type=int, default=4000, help="images of 32 px to draw")
    add("--tiny", action="store_true", help="few images, one short run: whether all of it works")
    add("--cifake", default=None, help="gpu-goals: folder of CIFAKE's shards, to time its speed run")
    add("--output", default=None, help="JSON file of the results")
    add("--compare", default=None, help="an earlier JSON file to compare with")
    add("--tolerance", type=float, default=0.15, help="share by which a median may fall")
    options = parser.parse_args(argv)
    if set(options.groups) <= set(MEMORY):
        return _memory(options)
    goals = options.groups == ["gpu-goals"]
    names = list(NAMES) if options.groups == ["all"] or goals else options.groups
    for name in names:
        if name not in (*NAMES, *APART):
            raise UserError(
                f"{name}: no such group; expected all, or some of {every}; alone: gpu-goals, {', '.join(MEMORY)}"
            )
    for key in ("repeats", "workers", "batch"):
        if options[key] < 1:
            raise UserError(f"--{key} is {options[key]}, expected at least 1")

    import torch

    from engines.benchmark import document as benchmark_document
    from engines.benchmark import goals as benchmark_goals
    from engines.benchmark import harness as benchmark
    from engines.benchmark import roofline
    from engines.benchmark.case import BenchmarkSettings
    from engines.benchmark.data import draw_images
    from engines.benchmark.registry import GROUPS

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    old = benchmark_document.read_document(options.compare) if options.compare else None
    keys = ("device", "workers", "batch", "images", "small", "seconds")
    given = {key: options[key] for key in keys}
    if options.tiny:
        given |= {"images": 150, "small": 400, "batch": 16, "seconds": 0.1}
    folder = Path(options.data) / f"{given['images']}-{given['small']}"
    facts, say = benchmark_document.machine(), _Progress()
    limits = None
    if {"step", "train", *APART} & set(names):
        say("measuring memory and arithmetic")
        precision = "bf16" if options.device == "cuda" else "fp32"
        limits = roofline.measure_limits(options.device, precision, options.workers)
    settings = BenchmarkSettings(folder=str(folder), limits=limits, **given)
    say(f"drawing and sharding {settings.images} and {settings.small} images in {folder}")
    draw_images(settings)
    groups, results, repeats = [GROUPS[name] for name in names], [], 1 if options.tiny else options.repeats
    rows = []
    if goals:
        results = benchmark_goals.measure_goals(settings, repeats, say)
        rows = benchmark_goals.compare_with_goals(results, gpu=options.device == "cuda")
        if options.cifake:
            rows.append(benchmark_goals.run_cifake(options.cifake, folder, options.device, say))
        rows.append(benchmark_goals.run_gpu_tests(say))
    else:
        for group in groups:
            results += benchmark.run_group(group, settings, repeats, say)
    written = benchmark_document.document(results, groups, settings, facts)
    print(benchmark_document.results_table(written))
    if goals:
        written["goals"] = rows
        print("\n" + benchmark_goals.goals_table(rows))
    if options.output:
        _write(options.output, written)
    if goals:
        return 1 if any(row["met"] == "no" for row in rows) else 0
    if old is None:
        return 0
    slower = benchmark_document.regressions(old, written, options.tolerance)
    print(f"\ncompared with {options.compare}: {'; '.join(slower) or 'nothing is slower than the tolerance'}")
    return 1 if slower else 0


def _memory(options: Any) -> int:
    counts = parse_int_list("--files", options.files, least=10, example="1000,10000")
    from engines.benchmark import document as benchmark_document
    from engines.benchmark import memory as benchmark_memory

    folder, say = Path(options.data) / "memory", _Progress()
    folder.mkdir(parents=True, exist_ok=True)
    facts, found = benchmark_document.machine(), {}
    for name in options.groups:
        found[name] = getattr(benchmark_memory, name.replace("-", "_"))(folder, counts, say)
        print(f"{name}\n\n{benchmark_memory.memory_table(found[name])}\n")
    if options.output:
        _write(options.output, {"machine": facts, **found})
    return 0


def _write(output: str, written: Any) -> None:
    from dataio.core.atomic import write_text

    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(written, indent=1) + "\n")
    print(f"\nresults: {path}")


class _Progress:
    def __call__(self, text: str) -> None:
        print(f"benchmark: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
