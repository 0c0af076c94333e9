"""The check of a job's nodes, as processes that take each other for nodes."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines.cluster.preflight import Chosen, Node, find_problem
from tests.support import environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def preflight(repo_root, *words, nodes=2, started=None, timeout=60, per_node=None, options=()):
    """Start one process for each node of a pretended job; returns (code, stdout, stderr) of each."""
    command = [sys.executable, str(repo_root / "launch/preflight.py"), "--script", "launch/train.py"]
    command += ["--gpu-config", "configs/resnet50_genimage.yaml", "--cpu-config", "configs/quickstart.yaml"]
    command += ["--names", ",".join(f"n{number}" for number in range(nodes)), "--timeout", str(timeout)]
    command += ["--head", "127.0.0.1", "--port", str(_free_port()), *options, "--", *words]
    processes = []
    for number in range(nodes if started is None else started):
        env = {**environment(), "SLURM_NODEID": str(number), "SLURM_NNODES": str(nodes)}
        env |= {
            "SLURM_JOB_NODELIST": "n[0-9]",
            "SLURM_CONF": "/nonexistent",
            **(per_node or {}).get(number, {}),
        }
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        return [(*reversed(p.communicate(timeout=200)), p.returncode)[::-1] for p in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_nodes_that_are_alike_pass_and_say_what_will_run(repo_root, tiny_shards, tmp_path):
    run = tmp_path / "run"
    first, second = preflight(repo_root, "--data.shards", str(tiny_shards), "--run.dir", str(run))
    assert first[0] == second[0] == 0, (first, second)
    assert first[1].splitlines() == [str(run), "1", "configs/quickstart.yaml"]
    assert "n0: no GPU" in first[2] and "n1: no GPU" in first[2]
    assert "all-reduce of 16 MiB between the nodes" in first[2]
    assert second[1] == "", "only the first node answers the script"
    assert not list(run.iterdir()), "the mark is removed"


def test_processes_per_node_can_be_given_and_a_given_configuration_is_kept(repo_root, tmp_path):
    [(code, out, err)] = preflight(
        repo_root,
        *("--config", str(repo_root / "configs/quickstart.yaml"), "--run.dir", str(tmp_path)),
        nodes=1,
        per_node={0: {"TELLTALE_PROCESSES_PER_NODE": "4"}},
    )
    assert code == 0, err
    assert out.splitlines() == [str(tmp_path), "4", "-"]


def test_a_node_that_does_not_answer_is_named(repo_root, tmp_path):
    [(code, out, err)] = preflight(repo_root, "--run.dir", str(tmp_path / "run"), started=1, timeout=2)
    assert code == 2 and out == ""
    assert err.strip().splitlines()[-1].startswith("error: n1: no answer within 2 s")


def test_a_command_that_cannot_be_parsed_is_refused_once_with_its_verdict(repo_root, tmp_path):
    first, second = preflight(repo_root, "--run.dir", str(tmp_path), "--optim.lx", "1")
    assert first[0] == second[0] == 2
    assert "--optim.lx" in first[2] and second[2].strip() == ""
    assert '"code": 2' in (tmp_path / "exit.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_node_without_a_gpu_is_refused_where_one_is_needed(repo_root, tiny_shards, tmp_path):
    words = ["--data.shards", str(tiny_shards), "--run.dir", str(tmp_path)]
    first, second = preflight(repo_root, *words, options=["--need-gpu"])
    assert first[0] == second[0] == 2 and first[1] == "" and second[2].strip() == ""
    assert first[2].strip().startswith("error: no GPU on n0: ask for one (")
    assert "unset TELLTALE_NEED_GPU" in first[2] and len(first[2].strip().splitlines()) == 1
    assert "no GPU on n0" in (tmp_path / "exit.json").read_text()


@pytest.mark.slow  # network file systems get fifteen seconds to show a new file
def test_a_folder_that_is_not_shared_is_named(repo_root, tmp_path):
    # The path is relative, and the working directories differ.
    command = [sys.executable, str(repo_root / "launch/preflight.py"), "--script", "launch/train.py"]
    command += ["--gpu-config", "configs/quickstart.yaml", "--cpu-config", "configs/quickstart.yaml"]
    command += [
        "--names",
        "n0,n1",
        "--head",
        "127.0.0.1",
        "--port",
        str(_free_port()),
        "--",
        "--run.dir",
        "run",
    ]
    processes = []
    for number in range(2):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        env = {**environment(), "SLURM_NODEID": str(number)}
        processes.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "error: n1: run.dir run is not the first node's" in said[0]


def nodes(**odd):
    """Three nodes that are alike, but for what the last one has."""
    made = [
        Node(
            f"n{n}",
            gpus=8,
            gpu="H200",
            alike={"torch": "2.15"},
            files={"data.shards": "aa"},
            free={"run.dir": 9.0},
        )
        for n in (1, 2, 3)
    ]
    for key, value in odd.items():
        setattr(made[-1], key, value)
    return made


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({}, ""),
        ({"gpus": 7}, "n3: GPUs is 7 H200, but 8 H200 on n1"),
        ({"alike": {"torch": "2.14"}}, "n3: torch is 2.14, but 2.15 on n1"),
        ({"files": {"data.shards": "bb"}}, "n3: data.shards is bb, but aa on n1"),
        ({"files": {"data.shards": "missing"}}, "data.shards: data/x/manifest.json does not exist on n3"),
        ({"free": {"run.dir": 0.2}}, "n3: 0.20 GiB free for run.dir, expected at least 1"),
        ({"apart": -7.5}, "n3: its clock is -7.5 s off n1's"),
        ({"problem": "GPU 3: an error"}, "n3: GPU 3: an error; fix that, or leave it out with --exclude=n3"),
    ],
)
def test_the_node_that_differs_is_the_one_that_is_named(odd, said):
    chosen = Chosen(Path("run"), {"data.shards": Path("data/x/manifest.json")}, False, "", "")
    assert find_problem(nodes(**odd), chosen).startswith(said)
    assert bool(find_problem(nodes(**odd), chosen)) == bool(odd)
