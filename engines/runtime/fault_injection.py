"""Fault injection for tests: kill this process, let it hang or give it a NaN at a named point.

    TELLTALE_FAULT="kill@checkpoint.fsynced:step=6,rank=0; hang@data.next:step=4,rank=1"

Each is KIND@POINT:CONDITIONS, several are divided by semicolons. Kinds: `kill` (SIGKILL to this
process), `kill_all` (to all training processes of this machine), `kill_launcher`, `raise`,
`hang`, `disk_full`; and at `step.forward` also `nan`, `inf` (of the logits) and `nan_gradient`.
Conditions: `step` (done so far), `rank`, and `restart` (torchrun's count), all equal where given.
The variable is read once, here; without it a point costs one comparison.
"""

import errno
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dataio.core.errors import UserError
from dataio.core.log import progress

if TYPE_CHECKING:
    import torch

VARIABLE = "TELLTALE_FAULT"
POINTS = (
    "step.begin",
    "step.forward",
    "data.next",
    "validation.batch",
    "validation.end",
    "epoch.end",
    "best.write",
    "metrics.write",
    "checkpoint.begin",
    "checkpoint.write",
    "checkpoint.written",
    "checkpoint.fsynced",
    "checkpoint.renamed",
    "checkpoint.delete",
    "export",
)
_CORRUPTIONS = ("nan", "inf", "nan_gradient")
KINDS = ("kill", "kill_all", "kill_launcher", "raise", "hang", "disk_full", *_CORRUPTIONS)


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, where, and under which conditions."""

    kind: str
    point: str
    conditions: dict[str, int] = field(default_factory=dict)

    def strikes(self, point: str, step: int | None) -> bool:
        if point != self.point:
            return False
        now = {
            "step": step,
            "rank": int(os.environ.get("RANK", "0")),
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        }
        return all(now[name] == value for name, value in self.conditions.items())


def parse_faults(text: str) -> list[Fault]:
    """Parse a value of TELLTALE_FAULT.

    Raises:
        UserError: the value does not have the form above.
    """
    faults = []
    for part in filter(None, map(str.strip, text.split(";"))):
        what, _, when = part.partition(":")
        kind, _, point = what.partition("@")
        conditions = {}
        for condition in filter(None, when.split(",")):
            name, _, value = condition.partition("=")
            if name not in ("step", "rank", "restart") or not value.isdecimal():
                raise UserError(
                    f"{VARIABLE}: {condition!r} in {part!r}, expected step=N, rank=N or restart=N"
                )
            conditions[name] = int(value)
        if kind not in KINDS or point not in POINTS or (kind in _CORRUPTIONS and point != "step.forward"):
            raise UserError(
                f"{VARIABLE}: {what!r}, expected KIND@POINT with one of {', '.join(KINDS)} and one of "
                f"{', '.join(POINTS)}"
            )
        faults.append(Fault(kind, point, conditions))
    return faults


_faults: list[Fault] | None = parse_faults(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def any_set() -> bool:
    """Whether this process was started with faults."""
    return _faults is not None


def inject(point: str, step: int | None = None) -> None:
    """Let a fault strike here, if one is set for this point and step."""
    if _faults is not None:
        for fault in _faults:
            if fault.kind not in _CORRUPTIONS and fault.strikes(point, step):
                _strike(fault, step)


def corrupt_logits(logits: "torch.Tensor", step: int) -> "torch.Tensor":
    """The logits, changed if a fault is set for `step.forward`."""
    if _faults is not None:
        for fault in _faults:
            if fault.kind in _CORRUPTIONS and fault.strikes("step.forward", step):
                if fault.kind == "nan_gradient":
                    logits.register_hook(lambda gradient: gradient * math.nan)
                else:
                    logits = logits * (math.nan if fault.kind == "nan" else math.inf)
    return logits


def _strike(fault: Fault, step: int | None) -> None:
    progress.info(f"fault: {fault.kind} at {fault.point}, step {step}")
    if fault.kind == "disk_full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault.kind == "raise":
        raise RuntimeError(f"fault at {fault.point}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "kill_launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    elif fault.kind == "kill_all":
        for pid in [*_siblings(), os.getpid()]:
            os.kill(pid, signal.SIGKILL)
    _hang()


def _hang() -> NoReturn:
    while True:  # a killed process gets here for an instant, too
        time.sleep(3600)


def _siblings() -> list[int]:
    """The other children of this process's parent."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getppid():
                pids.append(int(folder.name))
    return pids
