"""A disk that is too small: said before, and when it fills all the same, whole shards only."""

import hashlib
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataio.layouts import open_layout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.disk_space import space_needed
from dataio.sharding.plan import read_plan
from tests.support import wait_until

SIZE = 96


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "images"
    write_synthetic(folder, images=150, size=SIZE, seed=6)
    return folder


@pytest.fixture(scope="module")
def whole(source, repo_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    done = subprocess.run(words(source, output, repo_root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def words(source, output, repo_root):
    flags = ("--layout", "synthetic", "--synthetic.images", "150", "--synthetic.seed", "6", "--workers", "1")
    size = ("--synthetic.size", str(SIZE), "--codec.size", str(SIZE), "--samples-per-shard", "20")
    script = str(repo_root / "launch" / "shard.py")
    return [sys.executable, script, *flags, *size, "--source", str(source), "--output", str(output)]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_missing_is_said_before_a_shard_is_written(source, whole, repo_root, tmp_path):
    probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("needs a small file system: unshare of util-linux, and user namespaces allowed")
    # A disk of 400 KiB for about 1 MiB, which only this process sees.
    script = f'mount -t tmpfs -o size=400k tmpfs {tmp_path} && "$@"; code=$?; find {tmp_path} -mindepth 1; exit $code'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", *words(source, tmp_path / "out", repo_root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for word in (
        f"--output {tmp_path / 'out'}: 9 shards need about",
        "KiB are free",
        "are missing; make room",
    ):
        assert word in done.stderr
    assert done.stdout == ""  # nothing half-written


def test_the_estimate_is_close(source, whole, repo_root, tmp_path):
    begun = subprocess.Popen(
        words(source, tmp_path / "out", repo_root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: (tmp_path / "out" / ".work" / "plan.json").exists(), 60, "the plan")
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    plan = read_plan(tmp_path / "out" / ".work")
    assert plan is not None
    layout = open_layout("synthetic", source)
    taken = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    assert space_needed(tmp_path / "out", plan, plan.tasks, layout.source) == pytest.approx(taken, rel=0.25)
    assert space_needed(tmp_path / "out", plan, [], layout.source) == 0


def test_a_disk_that_fills_leaves_whole_shards_and_the_same_bytes_in_the_end(
    source, whole, repo_root, tmp_path
):
    sizes = sorted(path.stat().st_size for path in whole.glob("*/*.tar"))
    limit = sizes[-1] - 1  # the largest shard does not fit, as on a disk with a quota

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(
        words(source, tmp_path / "out", repo_root), preexec_fn=small_files, capture_output=True, text=True
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "File too large; fix that and run the same again" in full.stderr
    complete = contents(whole)
    written = {name: sha for name, sha in contents(tmp_path / "out").items() if not name.startswith(".work")}
    assert written.items() < complete.items() and not list((tmp_path / "out").rglob(".*.tmp"))

    again = subprocess.run(words(source, tmp_path / "out", repo_root), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out") == complete
