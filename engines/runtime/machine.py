"""The machine that a run is planned for, which need not be this one."""

from dataclasses import dataclass

import torch

from engines.runtime.distributed import World

GPU_RESERVE = 1.5 * 2**30
"""Bytes of a GPU that estimates leave for CUDA's context, NCCL's buffers and cuBLAS's workspace."""


@dataclass(frozen=True)
class Machine:
    """Nodes, and what each of them has.

    Attributes:
        nodes: of the job. per_node: processes on each, one for each GPU where there are GPUs.
        on_gpu: whether a process has a GPU; else it computes on the CPU.
        gpu_memory: bytes of a GPU; None where that is not known.
    """

    nodes: int
    per_node: int
    on_gpu: bool
    gpu_memory: float | None = None

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node

    @property
    def first_process(self) -> World:
        """What rank 0 would see, without a process group."""
        return World(0, self.processes, 0, torch.device("cuda" if self.on_gpu else "cpu"), distributed=False)

    def __str__(self) -> str:
        unit = "GPU" if self.on_gpu else "process on the CPU"
        many = "GPUs" if self.on_gpu else "processes on the CPU"
        each = f"{self.per_node} {unit if self.per_node == 1 else many}"
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} of {each}"


def format_duration(seconds: float) -> str:
    """Seconds as "12 s", "3.4 min", "5.6 h" or "7.8 days"."""
    for least, unit, name in ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
