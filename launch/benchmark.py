r"""Measure telltale and common alternatives on this machine.

    telltale benchmark all --output docs/benchmarks/NAME.json
    telltale benchmark load train --device cuda --repeats 5
    telltale benchmark all --tiny
    telltale benchmark load --compare docs/benchmarks/NAME.json
    telltale benchmark shard-memory predict-memory --files 1000,10000,100000
    telltale benchmark gpu-check --device cuda --cifake data/cifake --output docs/benchmarks/gpu-NAME.json
    telltale benchmark gpu-check --device cuda --parts step,tars --output docs/benchmarks/gpu-NAME.json
    telltale benchmark gpu-check --device cpu --tiny
    telltale benchmark multigpu-check --device cuda --gpus 4 --output docs/benchmarks/multigpu-NAME.json
    telltale benchmark multigpu-check --device cpu --tiny --gpus 2

Cases of a group run interleaved (ABAB), each in its own process, after one cold run. Prints a
Markdown table; --output also writes JSON. With --compare, a median that fell by more than --tolerance ends
the command with code 1.

gpu-check runs tests/gpu and what the project's goals for one GPU name, part by part, in less than ten minutes.
Each figure is printed as it comes, and the file is written after each part, beside the parts that it has already.
Ends with code 1 where a part fails or a floor is missed.

multigpu-check does so for 2 to 8 GPUs of one machine: all-reduces, equal losses under DDP and CUDA graph, images/s by
number of GPUs, both launchers, resume on fewer.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.benchmark.check_parts import MULTI_PARTS, PARTS
from engines.config.parser import Parser, parse_int_list
from engines.runtime.command import run_command

NAMES = (
    *("shard", "read", "decode", "load", "load-small", "step", "train", "eval"),
    *("scaling", "checkpoint", "finetune", "finetune-full"),
)
APART = ("worth",)  # groups that `all` leaves out
MEMORY = ("shard-memory", "predict-memory")
CHECKS = ("gpu-check", "multigpu-check")
_EVERY = ", ".join((*NAMES, *APART))


def make_parser() -> Parser:
    parser = Parser("benchmark", __doc__)
    kinds = (
        f"all (but {', '.join(APART)}); some of {_EVERY}; some of {', '.join(MEMORY)}; {' or '.join(CHECKS)}"
    )
    parser.add_argument("groups", nargs="+", help=kinds)
    add = parser.add_argument_group("Measurement").add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where loading and training compute")
    add("--repeats", type=int, default=3, help="timed runs of each case")
    add("--seconds", type=float, default=1.5, help="least time of a run")
    add("--workers", type=int, default=2, help="processes or threads of each case")
    add("--batch", type=int, default=64, help="images in a batch (training on a CPU: at most 32)")
    parts = f"gpu-check: some of {','.join(PARTS)}; multigpu-check: of {','.join(MULTI_PARTS)}"
    add("--parts", default="", help=f"{parts}; all but compile where left out")
    add(
        "--gpus",
        type=int,
        default=0,
        help="multigpu-check: how many, 2 to 8; all where left out (on a CPU: 2)",
    )
    add("--tiny", action="store_true", help="few images, one short run: whether all of it works")
    add = parser.add_argument_group("Data").add_argument
    add("--data", default="data/benchmark", help="folder of the images, drawn here where missing")
    add("--images", type=int, default=600, help="images of 256 px to draw")
    add("--small", type=int, default=4000, help="images of 32 px to draw")
    add("--files", default="1000,10000", help="shard-memory, predict-memory: numbers of tiny files")
    add("--cifake", default="", help="gpu-check: folder of CIFAKE's shards, to time its speed run")
    add = parser.add_argument_group("Results").add_argument
    add("--commit", default="", help="checks: the code's commit, where the folder is not a repository")
    add("--output", default="", help="JSON file of the results")
    add("--compare", default="", help="an earlier JSON file to compare with")
    add("--tolerance", type=float, default=0.15, help="share by which a median may fall")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if set(options.groups) <= set(MEMORY):
        counts = parse_int_list("--files", options.files, least=10, example="1000,10000")
        from engines.benchmark.session import run_memory

        run_memory(options.groups, counts, options.data, options.output)
        return 0
    if len(options.groups) == 1 and options.groups[0] in CHECKS:
        return _check(options.groups[0], options)
    for key in ("parts", "cifake", "commit", "gpus"):
        if options[key]:
            raise UserError(f"--{key} is {options[key]}, expected only with {_checks_with(key)}")
    names = list(NAMES) if options.groups == ["all"] else options.groups
    for name in names:
        if name not in (*NAMES, *APART):
            expected = f"all, or some of {_EVERY}; alone: {', '.join((*CHECKS, *MEMORY))}"
            raise UserError(f"{name}: no such group; expected {expected}")
    for key in ("repeats", "workers", "batch"):
        if options[key] < 1:
            raise UserError(f"--{key} is {options[key]}, expected at least 1")

    from engines.benchmark.session import SessionPlan, run_session

    given = {field.name: options[field.name] for field in fields(SessionPlan) if field.name in options}
    return run_session(SessionPlan(**{**given, "groups": names}))


def _checks_with(key: str) -> str:
    """The checks that take a flag, in words."""
    return {"cifake": CHECKS[0], "gpus": CHECKS[1]}.get(key, " or ".join(CHECKS))


def _check(name: str, options: Any) -> int:
    parser = make_parser()
    for key in ("repeats", "seconds", "batch", "images", "small", "files", "compare", "tolerance"):
        if options[key] != parser.get_default(key):
            raise UserError(f"--{key} is {options[key]}: {name} has its own; leave it out")
    for key in ("cifake", "gpus"):
        if options[key] and name != _checks_with(key):
            raise UserError(f"--{key} is {options[key]}, expected only with {_checks_with(key)}")

    from engines.benchmark.check_run import CheckPlan
    from engines.benchmark.session import gpus_to_check, run_gpu_check

    workers = options.workers if options.workers != parser.get_default("workers") else 0
    gpus = gpus_to_check(options.gpus, options.device) if name == CHECKS[1] else 0
    keys = ("parts", "device", "data", "cifake", "tiny", "commit", "output")
    return run_gpu_check(CheckPlan(**{key: options[key] for key in keys}, workers=workers, gpus=gpus))


if __name__ == "__main__":
    run_command(main)
