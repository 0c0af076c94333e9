"""--dry-run: the machine that a command is planned for."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dataio.core.errors import UserError
from engines.runtime.launcher import count_processes, under_launcher

if TYPE_CHECKING:
    from engines.runtime.machine import Machine

PLANNED = ("nodes", "rate", "gpu_memory")
"""What describes the machine, and has no meaning without --dry-run."""


def add_planned_flags(parser: Any) -> None:
    """Add --dry-run, --nodes, --rate and --gpu-memory to a parser, or to a group of one."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the batch of each process, steps, memory, reads and expected time, make the checks that "
        "precede the first step, and write nothing; --gpus N is then of each node, none of which need be here",
    )
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="with --dry-run: nodes of the job (default: 1)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="X",
        help="with --dry-run: images (finetuning: conversations) per second of a GPU (default: where it was measured)",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="with --dry-run: memory of a GPU (default: any)"
    )


def planned_machine(options: argparse.Namespace, gpus: str | None, fits: Callable[[int], bool]) -> "Machine":
    """The machine that --nodes, --gpus, --processes and --gpu-memory describe, else the launcher's, else this one.

    Args:
        gpus: a number, "all", or None for one process. fits: whether so many processes can share the batch.

    Raises:
        UserError: a value that is not above 0.
    """
    import torch

    from engines.runtime.machine import Machine

    for name in (*PLANNED, "processes"):
        value = getattr(options, name, None)
        if value is not None and not value > 0:
            raise UserError("expected more than 0", field=name, value=value)
    if options.gpus is not None and options.processes is not None:
        raise UserError("--gpus and --processes: give one of them")
    if gpus not in (None, "all") and not (gpus.isdecimal() and int(gpus) > 0):
        raise UserError("expected all, or a number from 1 on", field="gpus", value=gpus)
    nodes, on_gpu = options.nodes or 1, torch.cuda.is_available()
    if options.processes is not None:
        each, on_gpu = options.processes, False
    elif options.gpus not in (None, "all"):
        each, on_gpu = int(options.gpus), True
    elif under_launcher():
        each = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        nodes = options.nodes or max(1, int(os.environ.get("WORLD_SIZE", "1")) // each)
    elif gpus is None:
        each = 1
    else:
        each = count_processes(gpus, lambda n: fits(n * nodes))
    memory = None if options.gpu_memory is None else options.gpu_memory * 2**30
    return Machine(nodes, each, on_gpu, memory)
