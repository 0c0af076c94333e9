"""The most memory this process has used."""

from pathlib import Path

import torch


def peak_host_bytes() -> int:
    """Peak resident memory of this process.

    VmHWM, not ru_maxrss: that begins with what the parent had when it started this process.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory where this process computes: allocated on the GPU, else resident on the host."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes()
