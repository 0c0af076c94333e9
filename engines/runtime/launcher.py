"""Start the processes of a run on this machine, for commands that were started without a launcher.

Wraps torchrun, whose own exit code is 1 for everything: the run's verdict comes from RUN/exit.json.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.core.parent_process import die_with_parent
from engines.runtime.command import EXIT_USER_ERROR
from engines.runtime.exit_file import EXIT, read_exit

# For the ranks after the run's outcome is on disk; they have `engines.runtime.ending` for less.
LEAVE_SECONDS = 180.0
_STOP = "stop"  # see engines.runtime.distributed.StopRequest


def under_launcher() -> bool:
    """Whether a launcher (torchrun, deepspeed or srun) has started this process as one of its ranks."""
    # SLURM_PROCID would not do: a batch script and an interactive shell have it too.
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def count_processes(gpus: str, fits: Callable[[int], bool]) -> int:
    """The number of processes that `--gpus` means.

    Args:
        gpus: a number, or "all": as many of this machine's GPUs as `fits` allows, and one
            process on the CPU where there is none.
        fits: whether the run can be divided over so many processes.

    Raises:
        UserError: not a number, or more than there are.
    """
    import torch

    available = torch.cuda.device_count()
    if gpus == "all":
        count = next((n for n in range(available, 1, -1) if fits(n)), 1)
        if count < available:
            log.warning(
                f"{count} of {available} GPUs are used: train.global_batch cannot be shared among more; raise it"
            )
        return count
    if int(gpus) > available:
        raise UserError(
            f"this machine has {available or 'no'} GPU{'s' if available > 1 else ''}; "
            "--processes N starts N processes on the CPU",
            field="gpus",
            value=gpus,
        )
    return int(gpus)


def launch_processes(script: Path, argv: Sequence[str], processes: int, run: Path) -> int:
    """Run `script` under torchrun with the run folder `run`, and wait for it.

    On SIGTERM, SIGINT or SIGUSR1 the ranks save after the step they are at, and stop; a second
    signal goes to torchrun, which gives them 30 seconds.

    Returns:
        0 finished, 2 user error (a rank has printed it), 75 stopped and saved, 1 anything else.
    """
    for name in (EXIT, _STOP):
        (run / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # Ranks that stop or refuse then end with 0, and torchrun prints no traceback of its own. The
    # number of threads is torchrun's, which it otherwise announces.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TELLTALE_VERDICT": "file"}
    # In a session of its own: Ctrl-C reaches it through this process only, and so once.
    child = subprocess.Popen(
        [*command, str(script), *argv],
        env=environment,
        start_new_session=True,
        # On SIGTERM torchrun ends its ranks, and they save: no run outlives the command that started it.
        preexec_fn=partial(die_with_parent, signal.SIGTERM, os.getpid()),
    )
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if asked:
            child.send_signal(signal.SIGTERM)
        else:
            # All ranks see the file, without torchrun's traceback and its limit of 30 seconds.
            run.mkdir(parents=True, exist_ok=True)
            (run / _STOP).write_text(signal.Signals(number).name)
        asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = _wait(child, run)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    outcome = read_exit(run)
    if outcome is None:
        # Refused before the folder was the run's own (rank 0 has printed why), or killed.
        return EXIT_USER_ERROR if code == 0 else 1
    return int(outcome["code"])


def _wait(child: "subprocess.Popen[bytes]", run: Path) -> int:
    """Wait for torchrun; once the run has finished, for so long and then no longer."""
    finished: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1.0)
        if finished is None:
            finished = time.monotonic() if (read_exit(run) or {}).get("code") == 0 else None
        elif time.monotonic() - finished > LEAVE_SECONDS:
            log.warning(
                f"{run} has finished, but its processes have not ended in {LEAVE_SECONDS:.0f} s; they are ended"
            )
            child.kill()  # the ranks die with it, see die_with_launcher
