"""Slurm's epilog: on each node after each job, also before a requeued job starts again.

proctrack/pgid cannot see processes that made a session of their own, as torchrun's workers do.
What still carries this job's id in its environment is killed here, as a real cluster's cgroup does.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path


def main(folder: str) -> None:
    wanted = {
        f"SLURM_JOB_ID={os.environ['SLURM_JOB_ID']}".encode(),
        f"SLURM_CONF={folder}/slurm.conf".encode(),
        f"SLURMD_NODENAME={os.environ['SLURMD_NODENAME']}".encode(),
    }
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            variables = set(Path(f"/proc/{name}/environ").read_bytes().split(b"\0"))
            # The epilog itself has no SLURM_PROCID.
            if wanted <= variables and any(v.startswith(b"SLURM_PROCID=") for v in variables):
                os.kill(int(name), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
