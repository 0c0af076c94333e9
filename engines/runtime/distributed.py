"""The processes of a run: joining them, raising errors on all, stopping all after the same step."""

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dataio.core.errors import UserError
from dataio.core.parent_process import die_with_parent
from engines.runtime.command import SharedError
from engines.runtime.rendezvous import agree_on_run_id, run_store

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank, device and size of a run, as this process sees them.

    Attributes:
        rank, size: of all processes. local_rank: on this machine.
        device: where this process computes.
        distributed: whether there is a process group to talk to.
        run_id: of this start of the processes, see `engines.runtime.rendezvous`.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    distributed: bool
    run_id: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait on the host until all ranks get here."""
        if self.distributed:
            dist.all_reduce(torch.zeros(1))


def die_with_launcher() -> None:
    """Under torchrun: let the kernel kill this process when torchrun ends, however it ends.

    A worker that outlived its launcher would write into the same folder as the next run. A
    process started by hand may outlive its shell (nohup).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGKILL)


def init_distributed(timeout_minutes: float = 30.0) -> World:
    """Join the process group that torchrun's environment describes; without one, be the only process.

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
    distributed, run_id = "WORLD_SIZE" in os.environ, ""
    if distributed:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        run_id = agree_on_run_id(store, rank, size, 60 * timeout_minutes)
        dist.init_process_group(
            backend, store=run_store(run_id, store), rank=rank, world_size=size, timeout=timeout
        )
    return World(rank, size, local_rank, device, distributed, run_id)


def shutdown_distributed(world: World) -> None:
    """Leave the process group, if there is one; harmless when repeated."""
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
        problem = (error.message, error.field, None if error.value is None else str(error.value))
    problems: list[tuple[str, str, str | None] | None] = [problem]
    if world.distributed:
        problems = [None] * world.size
        dist.all_gather_object(problems, problem)
    for rank, raised in enumerate(problems):
        if raised is not None:
            message, field, value = raised
            raise SharedError(message if rank == 0 else f"{message} (rank {rank})", field=field, value=value)
    return result  # type: ignore[return-value]


def on_rank0(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone and give its result, or its UserError, to every rank."""
    result = on_all_ranks(world, lambda: work() if world.is_main else None)
    if world.distributed:
        box: list[Any] = [result]
        dist.broadcast_object_list(box, src=0)
        result = box[0]
    return result  # type: ignore[return-value]


class StopRequest:
    """Turns SIGTERM, SIGUSR1 or a `stop` file in the run folder into one common step.

    A signal reaches ranks at different times (or only some), so it only sets a flag; the
    ranks compare flags with an all-reduce and so stop after the same step.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._file = world, folder / "stop"
        self._reason = ""
        self._checked_at = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def _check_file(self) -> None:
        now = time.monotonic()
        if self._world.is_main and not self._reason and now - self._checked_at > 0.5:
            self._checked_at = now
            with contextlib.suppress(OSError):
                # `telltale train` leaves the name of the signal that it received.
                self._reason = self._file.read_text().strip() or f"{self._file} exists"

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective, so every rank must call it."""
        self._check_file()
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
