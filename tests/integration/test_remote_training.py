"""A training run whose shards are behind a URL: the same result as from a folder, and it may move."""

import shutil
import subprocess
import sys
import time

import pytest

from tests.remote_servers import S3Server, point_s3_at
from tests.runs import assert_same, lines, outcome
from tests.support import environment, flags, wait_until


def train(repo_root, shards, folder, *words):
    options = {"data__shards": shards, "run__dir": folder, "train__epochs": 3, "data__window_shards": 1}
    return [sys.executable, str(repo_root / "launch" / "train.py"), *flags(**options), *words]


@pytest.mark.slow
def test_the_server_is_killed_in_mid_run_and_the_run_moves_to_a_folder(
    tiny_shards, repo_root, tmp_path, monkeypatch
):
    disk = tmp_path / "disk"
    shutil.copytree(tiny_shards, disk / "bucket" / "set")
    server = S3Server(disk)
    point_s3_at(monkeypatch, server.port)
    local = train(repo_root, tiny_shards, tmp_path / "local")
    done = subprocess.run(local, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]

    run, cache = tmp_path / "run", tmp_path / "cache"
    # A cache of two small shards: every window is copied anew, so the server is needed at all times.
    remote = train(
        repo_root, "s3://bucket/set", run, "--data.cache_dir", str(cache), "--data.cache_gib", "0.00014"
    )
    process = subprocess.Popen(
        remote, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: any(line["step"] >= 2 for line in lines(run)), 120, "step 2")
        server.kill()
        time.sleep(4)
        step = lines(run)[-1]["step"]
        assert step < 21  # it waits
        server.start()
        wait_until(lambda: lines(run)[-1]["step"] > step, 120, "the next step")
        (run / "stop").touch()
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
        server.kill()
    assert outcome(run)["code"] == 75, told[-3000:]
    moved = train(repo_root, tiny_shards, run)
    done = subprocess.run(moved, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and "continuing after step" in done.stdout, done.stderr[-3000:]
    assert_same(run, tmp_path / "local")
