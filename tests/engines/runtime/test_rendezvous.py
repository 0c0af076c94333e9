"""Processes that a launcher starts anew meet the living, not the addresses of the dead."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from engines.runtime.rendezvous import agree_on_run_id


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20))


def meeting(store, size, seconds=60.0):
    def one(rank):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        return agree_on_run_id(client, rank, size, seconds)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_all_agree_and_never_on_an_earlier_name(store):
    names = [meeting(store, size) for size in (4, 4, 2, 4)]
    assert all(len(set(found)) == 1 for found in names)
    assert len({found[0] for found in names}) == 4


def test_nobody_settles_on_the_token_of_a_dead_one(store):
    meeting(store, 3)
    # Ranks 0 and 1 are there again, 2 is late: its old token lies in the store.
    found = {}

    def one(rank):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        found[rank] = agree_on_run_id(client, rank, 3, 60)

    early = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in early:
        thread.start()
    early[0].join(timeout=1.0)
    assert found == {}
    one(2)
    for thread in early:
        thread.join()
    assert len(set(found.values())) == 1 and len(found) == 3


def test_who_waits_in_vain_says_so(store):
    with pytest.raises(TimeoutError, match="rank 0 waited 1 s for the other 1 to start"):
        agree_on_run_id(store, 0, 2, 1.0)
