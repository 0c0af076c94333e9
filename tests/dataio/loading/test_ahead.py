"""Work in a thread ahead of who takes it: order, errors, bounds, and how the thread ends."""

import gc
import subprocess
import sys
import threading
import time
import traceback

import pytest

from dataio.loading.ahead import Ahead

NAME = "ahead-of-the-test"


def threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def gone(count=0, patience=10.0):
    end = time.monotonic() + patience
    while len(threads()) > count and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return len(threads()) == count


def numbers(made, stop=10**9):
    for number in range(stop):
        made.append(number)
        yield number


def test_items_come_in_order_from_another_thread():
    where = []

    def make():
        for number in range(100):
            where.append(threading.current_thread().name)
            yield number

    ahead = Ahead(make, 3, NAME)
    assert list(ahead) == list(range(100)) and set(where) == {NAME}
    with pytest.raises(StopIteration):
        next(ahead)
    assert gone()


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_than_depth_items_are_made_ahead(depth):
    made: list[int] = []
    ahead = Ahead(lambda: numbers(made), depth, NAME)
    assert made == []  # nor is there a thread before the first is asked for
    assert not threads()
    for taken in range(1, 6):
        assert next(ahead) == taken - 1
        time.sleep(0.1)
        assert len(made) == taken + depth
    ahead.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_what_is_raised_comes_behind_the_items_before_it_with_its_traceback():
    def failing():
        raise KeyError("the reason")

    def make():
        yield 1
        yield 2
        try:
            failing()
        except KeyError as error:
            raise ValueError("told") from error

    ahead = Ahead(make, 4, NAME)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="told") as caught:
        next(ahead)
    assert isinstance(caught.value.__cause__, KeyError)
    told = "".join(traceback.format_exception(caught.value))
    assert "in failing" in told and "in make" in told
    with pytest.raises(StopIteration):
        next(ahead)
    assert gone()


def test_an_iterator_that_cannot_be_made_is_an_error_of_the_first_item():
    def make():
        raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        next(Ahead(make, 2, NAME))


def test_a_forgotten_iterator_ends_its_thread_which_closes_what_it_used():
    closed = []

    def make():
        try:
            yield from range(10**9)
        finally:
            closed.append(threading.current_thread().name)

    for _ in range(20):
        next(Ahead(make, 2, NAME))
    assert gone() and closed == [NAME] * 20


def test_the_thread_waits_for_what_it_was_given():
    made: list[int] = []
    passed = threading.Event()
    ahead = Ahead(lambda: numbers(made), 2, NAME)
    ahead.take(passed.wait)
    ahead.take(None)
    time.sleep(0.1)
    assert made == [0, 1]  # the third of them waits
    passed.set()
    assert ahead.take(None) == 2
    ahead.close()


@pytest.mark.parametrize("end", ["", "raise RuntimeError('ours')", "sys.exit(3)"])
def test_a_process_ends_while_its_thread_works(end):
    code = f"""
import atexit, sys, time
from dataio.loading.ahead import Ahead
state = []
atexit.register(lambda: print('working' if state else 'idle'))  # a library's, of before
def make():
    while True:
        state.append(1)
        time.sleep(0.3)
        state.clear()
        yield 1
ahead = Ahead(make, 2, 'x')
next(ahead)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == {"": 0, "r": 1, "s": 3}[end[:1]]
    assert done.stdout.split() == ["idle"]
