"""The processes of a multi-GPU check: torchrun starts `python -m engines.benchmark.check_ranks WORK TASK OPTIONS FILE`.

WORK names what each process does, TASK is a `CheckTask` and OPTIONS the work's own arguments, as JSON; rank
0 writes what it returns to FILE.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dataio.core.atomic import write_text
from engines.benchmark.check_report import CheckTask, decode_task, encode_task
from engines.runtime.paths import ROOT

_WORK = {"all-reduce": "time_all_reduce", "losses": "follow_losses", "rates": "measure_rates"}
# Of a program's output: a user error, or the last line of a traceback; torchrun's own says nothing.
_ERROR = re.compile(r"(?:\[rank\d+\]: *)?((?:[\w.]*Error|error)\b.*: .*)")


def run_ranks(task: CheckTask, count: int, work: str, **options: Any) -> dict[str, Any]:
    """Let so many processes, one for each GPU, do a piece of work together.

    Args:
        work: a key of `_WORK`. options: its arguments, plain values.

    Returns:
        what rank 0 found.

    Raises:
        RuntimeError: a process failed.
    """
    with tempfile.TemporaryDirectory(dir=task.settings.folder) as folder:
        found = Path(folder) / "found.json"
        words = [work, encode_task(task), json.dumps(options), str(found)]
        run_program([*torchrun(count), "-m", "engines.benchmark.check_ranks", *words])
        result: dict[str, Any] = json.loads(found.read_text())
        return result


def torchrun(count: int) -> list[str]:
    """The command that starts so many processes on this machine, on a port of their own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]


def run_program(command: Sequence[str], **options: Any) -> str:
    """Run a program in the checkout; what it prints is in this part's log too.

    Args:
        options: of `subprocess.run`.

    Returns:
        its output, errors included.

    Raises:
        RuntimeError: it ended with another code than 0.
    """
    done = subprocess.run(
        list(command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    sys.stdout.write(done.stdout)
    sys.stdout.flush()
    if done.returncode:
        program = " ".join(command[1:6])
        raise RuntimeError(f"{program} ... ended with code {done.returncode}: {_reason(done.stdout)}")
    return done.stdout


def _reason(output: str) -> str:
    """The line that says why a program failed, else its last lines."""
    found = [match[1] for match in map(_ERROR.search, output.splitlines()) if match]
    told = [line for line in found if "ChildFailedError" not in line]
    return told[0][:300] if told else output[-300:].strip()


def _serve(work: str, task: str, options: str, file: str) -> None:
    from engines.runtime.distributed import die_with_launcher, init_distributed, shutdown_distributed

    die_with_launcher()
    world = init_distributed(timeout_minutes=5)
    function = getattr(import_module("engines.benchmark.check_rank_work"), _WORK[work])
    found = function(world, decode_task(task), **json.loads(options))
    if world.is_main:
        write_text(Path(file), json.dumps(found))
    world.barrier()
    shutdown_distributed(world)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
