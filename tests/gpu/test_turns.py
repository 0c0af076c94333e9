"""Tests take turns at the GPU; this one needs none."""

import multiprocessing
import time

from tests.gpu_turns import turn

_HOLD = 0.2  # seconds


def use(folder, alone, events, ready):
    ready.wait()
    with turn(folder, alone=alone):
        events.put(("in", alone, time.monotonic()))
        time.sleep(_HOLD)
        events.put(("out", alone, time.monotonic()))


def test_who_must_be_alone_is_alone_and_the_others_are_not_kept_apart(tmp_path):
    spawning = multiprocessing.get_context("spawn")
    events, ready = spawning.Queue(), spawning.Event()
    kinds = (False, True, False, True, False, False)
    processes = [spawning.Process(target=use, args=(tmp_path, alone, events, ready)) for alone in kinds]
    for process in processes:
        process.start()
    ready.set()
    seen = sorted((events.get(timeout=60) for _ in range(2 * len(kinds))), key=lambda event: event[2])
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = shared = together = 0
    for what, by_itself, _ in seen:
        change = 1 if what == "in" else -1
        alone, shared = alone + change * by_itself, shared + change * (not by_itself)
        assert alone <= 1 and not (alone and shared)
        together = max(together, shared)
    assert together > 1
