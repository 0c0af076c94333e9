"""A part of the launcher's store for each start of its processes.

torchrun keeps one store for all restarts (PyTorch 2.15: dynamic_rendezvous.py caches it, while
rendezvous.py assumes a new one), so a restarted process may read the address of a dead one. The
count of restarts cannot separate them: each machine counts for itself. So the processes first
agree on an id that only running processes can know.
"""

import hashlib
import time
import uuid
from typing import Any

import torch.distributed as dist


def agree_on_run_id(store: Any, rank: int, size: int, seconds: float) -> str:
    """An id that these `size` processes share and no earlier start had.

    Each process writes a new token into the store. Rank 0 proposes the list of all tokens it reads,
    and again when the list changes; a process confirms a proposal that has its token. Once all have
    confirmed, the id is the proposal's digest. The owner of a stale token is dead and confirms
    nothing, and rank 0's new token makes each list new.

    Args:
        store: the launcher's. seconds: to wait for the others.

    Raises:
        TimeoutError: the others did not start.
    """
    token, deadline, pause = uuid.uuid4().hex, time.monotonic() + seconds, 0.02
    keys = [f"meet/token/{other}" for other in range(size)]
    store.set(keys[rank], token)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(keys):
            store.set("meet/proposal", b"+".join(store.multi_get(keys)))
        if store.check(["meet/proposal"]):
            proposal = store.get("meet/proposal")
            tokens = proposal.decode().split("+")
            if len(tokens) == size and tokens[rank] == token:
                name = hashlib.sha256(proposal).hexdigest()[:16]
                store.set(f"meet/{name}/{rank}", "")
                if rank == 0 and store.check([f"meet/{name}/{other}" for other in range(size)]):
                    store.set(f"meet/{name}/settled", "")
                if store.check([f"meet/{name}/settled"]):
                    return name
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)  # the store is one process
    raise TimeoutError(f"rank {rank} waited {seconds:.0f} s for the other {size - 1} to start")


def run_store(run_id: str, store: Any) -> dist.PrefixStore:
    """The part of the launcher's store that only processes of this id use."""
    return dist.PrefixStore(f"run/{run_id}", store)
