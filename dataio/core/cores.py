"""How many cores this process may use."""

import os


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_count(workers: int | None) -> int:
    """The number of worker processes: as given, or where it is None the cores that may be used."""
    return available_cores() if workers is None else workers


def cores_per_process() -> int:
    """The cores for each of the processes that torchrun started on this machine; at least 1."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
