"""The process of one part of a GPU check: `python -m engines.benchmark.check_child PART FD TASK`.

FD is the descriptor that figures are written to, TASK a `CheckTask` as JSON.
"""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module

from dataio.core.errors import UserError
from engines.benchmark.case import Unavailable
from engines.benchmark.check_report import CheckTask, Reporter, decode_task

_MEASURES = {
    "data": "check_child:draw",
    "tests": "check_programs:measure_tests",
    "step": "check_training:measure_step",
    "tars": "check_training:measure_tars",
    "ghosts": "check_training:measure_ghosts",
    "decode": "check_loading:measure_decoding",
    "augment": "check_training:measure_augmented",
    "evaluate": "check_loading:measure_inference",
    "cifake": "check_programs:measure_cifake",
    "checkpoint": "check_training:measure_checkpoint",
    "finetune": "check_programs:measure_finetuning",
    "peers": "check_programs:measure_peers",
    "compile": "check_training:measure_compiled",
    "nccl": "check_multi:measure_nccl",
    "ddp": "check_multi:measure_ddp",
    "graphs": "check_multi:measure_graphs",
    "scaling": "check_multi:measure_scaling",
    "launchers": "check_launchers:measure_launchers",
    "resume": "check_launchers:measure_resume",
}


def draw(task: CheckTask, report: Reporter) -> None:
    """Draw and shard the images that the other parts need."""
    from engines.benchmark.data import draw_images

    draw_images(task.settings)


def measure_of(part: str) -> Callable[[CheckTask, Reporter], None]:
    """What measures a part; its module, and the libraries of that, are imported here."""
    module, name = _MEASURES[part].split(":")
    measure: Callable[[CheckTask, Reporter], None] = getattr(
        import_module(f"engines.benchmark.{module}"), name
    )
    return measure


def _serve(part: str, descriptor: int, text: str) -> int:
    # Not for programs that the part starts: the reader waits for the end of the stream.
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as stream:
        report = Reporter(stream)
        try:
            measure_of(part)(decode_task(text), report)
        except (UserError, Unavailable) as error:
            report.failed(part, str(error))
        except Exception:
            report.failed(part, traceback.format_exc())
    return 0


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
