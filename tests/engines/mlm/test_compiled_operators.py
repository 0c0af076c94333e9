"""What is said before DeepSpeed compiles, and of locks that nobody holds."""

import os
import time

import pytest

from dataio.core.log import log
from engines.mlm.compiled_operators import announce_compilation


@pytest.fixture(autouse=True)
def lines(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO")
    return caplog


def test_only_the_first_run_compiles(tmp_path, lines):
    announce_compilation(tmp_path, waits_for_file=True)
    assert "compiles its CPU operator; this takes about a minute, once" in lines.text
    lines.clear()
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    announce_compilation(tmp_path, waits_for_file=True)
    assert not lines.text


@pytest.mark.parametrize(
    ("age", "waits", "said"), [(3600, True, True), (60, True, False), (3600, False, False)]
)
def test_an_old_lock_is_named_where_pytorch_would_wait_for_it(tmp_path, lines, age, waits, said):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    announce_compilation(tmp_path, waits_for_file=waits)
    assert (f"{lock}: left by a killed process 1.0 hours ago" in lines.text) == said
