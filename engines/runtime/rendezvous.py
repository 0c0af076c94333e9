"""Meeting in the launcher's store, also after the launcher has started its processes anew.

torchrun keeps one store for all restarts (PyTorch 2.15: dynamic_rendezvous.py caches it, while
rendezvous.py takes it for new), so a process that is started again may read the address of one
that is dead. Its count of restarts cannot tell them apart: each machine has its own. So the
processes first agree on a name that only the living can know.
"""

import hashlib
import time
import uuid
from typing import Any

import torch.distributed as dist


def agree_on_run_id(store: Any, rank: int, size: int, seconds: float) -> str:
    """A name that these `size` processes have in common, and no earlier ones had.

    Each puts a new token into the store. Rank 0 proposes the list of all it reads, and again when
    that changes; a process confirms a proposal that has its own token. Once all have, it is settled:
    a stale token's owner is dead and confirms nothing, and rank 0's token makes each list new.

    Args:
        store: of the launcher. seconds: to wait for the others.

    Raises:
        TimeoutError: the others did not come.
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
    raise TimeoutError(f"rank {rank} waited {seconds:.0f} s in vain for the other {size - 1} to start")


def run_store(name: str, store: Any) -> dist.PrefixStore:
    """The part of the launcher's store that only these processes use."""
    return dist.PrefixStore(f"run/{name}", store)
