"""The model of communication: limits that are known in closed form, and its command."""

import math
import sys

import pytest

from engines.benchmark.scale_communication import MIB, Job, Network, all_reduce, buckets, cost

NETWORK = Network(per_node=8, nvlink=100e9, nic=10e9, alpha_node=0.0, alpha_net=0.0)


def job(**changes):
    values = {
        "gradient_bytes": 100e6,
        "statistics_bytes": 0.0,
        "forward": 0.01,
        "backward": 0.02,
        "batch": 64,
    }
    return Job(**{**values, **changes})


def test_within_a_node_it_is_the_ring():
    assert all_reduce(8e9, 8, NETWORK) == pytest.approx(2 * 7 / 8 * 8e9 / 100e9)
    assert all_reduce(8e9, 2, NETWORK) == pytest.approx(8e9 / 100e9)
    assert all_reduce(8e9, 1, NETWORK) == 0


def test_between_nodes_each_card_carries_its_part():
    between = all_reduce(8e9, 32, NETWORK) - all_reduce(8e9, 8, NETWORK)
    assert between == pytest.approx(2 * 3 / 4 * 8e9 / 8 / 10e9)


def test_latency_counts_messages_not_bytes():
    network = Network(per_node=8, nvlink=math.inf, nic=math.inf, alpha_node=1e-6, alpha_net=1e-5)
    assert all_reduce(1, 64, network) == pytest.approx(14e-6 + 6e-5)
    assert all_reduce(1e9, 64, network) == all_reduce(1, 64, network)


def test_buckets_hold_all_bytes():
    found = buckets(job())
    assert sum(found) == pytest.approx(100e6) and found[0] == MIB and max(found) == 25 * MIB
    assert buckets(job(gradient_bytes=1000.0)) == [1000.0]


def test_a_long_backward_hides_all_but_the_last_bucket():
    found = cost(job(backward=100.0), 8, NETWORK)
    last = buckets(job())[-1]
    assert found.waited == pytest.approx(all_reduce(last, 8, NETWORK))
    assert found.waited < found.messages / 4


def test_no_backward_hides_nothing():
    found = cost(job(forward=0.03, backward=0.0), 8, NETWORK)
    assert found.waited == pytest.approx(found.messages)


def test_one_gpu_is_alone_and_more_lose_more():
    alone = cost(job(), 1, NETWORK)
    assert (alone.efficiency, alone.waited) == (1.0, 0.0)
    assert alone.images_per_second == pytest.approx(64 / 0.03)
    shares = [cost(job(statistics_bytes=1e6), n, NETWORK).efficiency for n in (1, 8, 16, 64, 512)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 1


def test_the_command(run_command):
    lines = run_command("--backbone", "resnet18", "--gpus", "1,8", "--batch", "64").stdout.splitlines()
    assert lines[0].startswith("resnet18: 46.") and lines[4].startswith("| 1 | 0.00 | 0.00 |")
    assert len(lines) == 6


@pytest.mark.parametrize("words", [["--gpus", "8,x"], ["--nic", "0"], ["--backward-share", "1"]])
def test_the_command_names_a_bad_flag(run_command, words):
    done = run_command(*words)
    assert done.returncode == 2 and words[0] in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def run_command(repo_root):
    import subprocess

    def call(*words):
        command = [sys.executable, str(repo_root / "launch" / "communication.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return call
