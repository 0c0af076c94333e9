"""Processes: joining the others, agreeing with them, stopping together, never outliving."""

import ctypes
import datetime
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dataio.core.errors import UserError
from engines.runtime.command import SharedError
from engines.runtime.rendezvous import agree_on_run_id, run_store

T = TypeVar("T")
LOCK_WAIT_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """Who this process is among all of the run.

    Attributes:
        rank, size: of all processes. local_rank: on this machine.
        device: where this process computes.
        distributed: whether there is a process group to talk to.
        name: of these very processes, see `engines.runtime.rendezvous`.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    distributed: bool
    name: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all, on the host."""
        if self.distributed:
            dist.all_reduce(torch.zeros(1))


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when torchrun dies, however it dies.

    A worker that outlived its launcher would race the next run on the same folder. Only
    under torchrun: a process started by hand may outlive its shell (nohup).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() == 1:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def init_distributed(timeout_minutes: float = 30.0) -> World:
    """Join the process group that torchrun's environment describes, or stand alone.

    Uses gloo for CPU tensors (control messages) and NCCL for CUDA tensors (gradients).
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        # Before anything else touches CUDA, or every rank puts a context on GPU 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    distributed, name = "WORLD_SIZE" in os.environ, ""
    if distributed:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        name = agree_on_run_id(store, rank, size, 60 * timeout_minutes)
        dist.init_process_group(
            backend, store=run_store(name, store), rank=rank, world_size=size, timeout=timeout
        )
    return World(rank, size, local_rank, device, distributed, name)


def shutdown_distributed(world: World) -> None:
    if world.distributed and dist.is_initialized():
        dist.destroy_process_group()


def on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it is a UserError anywhere, raise it on every rank.

    Without this, the ranks that succeed would wait in their next collective for the rank
    that did not.
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [problem]
    if world.distributed:
        problems = [None] * world.size
        dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            others = "" if rank == 0 else f" (rank {rank})"
            raise SharedError(f"{found}{others}")
    return result  # type: ignore[return-value]


def on_rank0(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone and give its result, or its UserError, to every rank."""
    result = on_all_ranks(world, lambda: work() if world.is_main else None)
    if world.distributed:
        box: list[Any] = [result]
        dist.broadcast_object_list(box, src=0)
        result = box[0]
    return result  # type: ignore[return-value]


class FolderLock:
    """An exclusive lock on a run folder, held until the process ends.

    Raises:
        UserError: another run held it for `LOCK_WAIT_SECONDS`.
    """

    def __init__(self, folder: Path, wait_seconds: float = LOCK_WAIT_SECONDS) -> None:
        self._file = open(folder / ".lock", "a+")  # noqa: SIM115 (held open on purpose)
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "an unknown process"
                    raise UserError(
                        f"{folder}: another run is using this folder ({holder}); stop it or choose another --run.dir"
                    ) from None
                time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class StopRequest:
    """Turns SIGTERM, SIGUSR1 or a `stop` file in the run folder into one common step.

    A signal reaches ranks at different times (or only some), so it only sets a flag; the
    ranks compare flags with an all-reduce and so stop after the same step.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._file = world, folder / "stop"
        self._reason = ""
        self._looked = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def _look_for_file(self) -> None:
        now = time.monotonic()
        if self._world.is_main and not self._reason and now - self._looked > 0.5:
            self._looked = now
            if self._file.exists():
                self._reason = f"{self._file} exists"

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so every rank must call it."""
        self._look_for_file()
        if not self._world.distributed:
            return bool(self._reason)
        flag = torch.tensor([1.0 if self._reason else 0.0])
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    @property
    def reason(self) -> str:
        return self._reason or "another rank was asked to stop"

    def clear_file(self) -> None:
        """Remove the stop file once it has been obeyed, or the next start would stop at once."""
        if self._world.is_main:
            self._file.unlink(missing_ok=True)
