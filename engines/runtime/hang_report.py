"""What a process was doing when its run hung: the stacks of its threads and its last collectives.

In the run's folder, for rank N:

* `hang/rankN.txt`: a line that says where the rank was, then the Python stack of every thread;
* `hang/nccl_rank_N` and `hang/gloo_rank_N`: PyTorch's Flight Recorder, the last 2,000 collectives, pickled
  (TORCH_FR_BUFFER_SIZE sets the number; 0 is none). PyTorch's `torchfrtrace hang -p nccl_rank_` is made to
  compare NCCL's between ranks; gloo's it cannot read (2.15).
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch._C import _distributed_c10d

HANG = "hang"  # the folder
_OURS = ("dataio", "engines", "models", "launch")
# By the stage of `HangWatchdog.tick`.
_STAGES = {0: "between steps", 1: "validating", 2: "in a step"}
# The innermost frame whose module begins so says what is waited for.
_WAITS = {
    "nvidia.dali": "waiting for data",
    "dataio": "waiting for data",
    "torch.distributed": "in a collective",
    "torch.autograd": "in the backward pass, which reduces gradients",
    "torch.cuda": "waiting for the GPU",
}


def say_doing(stage: int) -> str:
    """What the main thread is doing, in a few words: the stage, what it waits for, and the line of ours it is at.

    Args:
        stage: as in `HangWatchdog.tick`.
    """
    frames = list(_main_thread_frames())
    words = [_STAGES[stage]]
    words += [wait for wait in map(_wait_of, frames) if wait][:1]
    for frame in frames:
        if _module(frame).partition(".")[0] in _OURS:
            return f"{', '.join(words)} ({_module(frame)}.{frame.f_code.co_name}, line {frame.f_lineno})"
    return ", ".join(words)


def write_hang_report(folder: Path, rank: int, heading: str) -> None:
    """Write this process's part of RUN/hang, over that of an earlier hang.

    Args:
        folder: the run's. heading: the text file's first line says it, after rank, host, process and time.
    """
    into = folder / HANG
    into.mkdir(parents=True, exist_ok=True)
    with open(into / f"rank{rank}.txt", "w") as file:
        when = time.strftime("%F %T")
        file.write(f"rank {rank} on {socket.gethostname()}, pid {os.getpid()}, {when}: {heading}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    for backend, dump in _flight_recorders():
        # Newer or older versions of PyTorch may lack it, or have been told not to record.
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            (into / f"{backend}_rank_{rank}").write_bytes(dump())


def try_for(seconds: float, work: Callable[[], None]) -> None:
    """Do what may never return (a disk that is gone, a lock that is held), for at most so many seconds."""

    def quietly() -> None:
        with contextlib.suppress(OSError):
            work()

    thread = threading.Thread(target=quietly, name="hang report", daemon=True)
    thread.start()
    thread.join(seconds)


def _main_thread_frames() -> Iterator[FrameType]:
    """The main thread's stack, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _wait_of(frame: FrameType) -> str:
    if frame.f_code.co_name == "next_batch":
        return "waiting for data"
    return next((wait for name, wait in _WAITS.items() if _module(frame).startswith(name)), "")


def _flight_recorders() -> Iterator[tuple[str, Callable[[], bytes]]]:
    if torch.cuda.is_initialized() and hasattr(_distributed_c10d, "_dump_nccl_trace"):
        yield "nccl", _distributed_c10d._dump_nccl_trace
    if hasattr(_distributed_c10d, "_dump_fr_trace"):
        yield "gloo", lambda: _distributed_c10d._dump_fr_trace(backend="gloo")
