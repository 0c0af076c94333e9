"""--dry-run: what a run would do for a machine that is not here, and the errors that it would end with."""

import subprocess

import numpy as np
import pytest

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.training_order import TrainingOrder
from dataio.shards.shard_set import ShardSet
from engines.runtime.machine import format_duration
from engines.runtime.run_folder import FolderLock
from launch import finetune_mlm, train
from tests.conversations import finetuning_flags, write_conversations
from tests.support import environment, flags


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def words(tiny_shards, tmp_path):
    return flags(data__shards=tiny_shards, run__dir=tmp_path / "run", train__steps=4)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_machine_that_is_not_here_is_planned_for(words, tmp_path, capsys):
    machine = ["--dry-run", "--nodes", "2", "--gpus", "2", "--rate", "0.5", "--gpu-memory", "80"]
    assert train.main([*machine, *words]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'}: resnet18 on 2 nodes of 2 GPUs, bf16" in said
    assert (
        "batch: 16 images a step are 4 ghost batches of 4; each of 4 processes has 1, in 1 pass of at most 4"
        in said
    )
    assert "steps: 4, 7 in an epoch" in said
    assert "learning rate: 0.005" in said
    assert "of 80.00 GiB on each GPU" in said
    assert "reads: each node 56 images of 6 of 6 shards in an epoch" in said  # half of 7 steps of 16
    assert "time: 32 s for 4 steps at 0.5 images/s of a process (given)" in said  # 4 steps of 4 images each
    assert "resume: no checkpoint, the run begins" in said
    assert not list(tmp_path.iterdir())


def test_uneven_shares_and_small_memories_are_said(words, capsys):
    assert train.main(["--dry-run", "--gpus", "3", *words]) == 0
    assert "each of 3 processes has 1 to 2, in 1 pass of at most 8 images" in (
        said := capsys.readouterr().out
    )
    assert "67% of their time is used" in said
    # 1.5 GiB are CUDA's, so next to nothing is left for passes.
    assert train.main(["--dry-run", "--gpus", "1", "--gpu-memory", "1.6", *words]) == 0
    assert "has 4, in 4 passes of at most 4 images" in capsys.readouterr().out


def test_what_a_run_left_is_looked_at_and_left_alone(words, tmp_path, capsys):
    assert train.main(words) == 0
    capsys.readouterr()
    assert train.main(["--dry-run", *words]) == 0
    assert "resume: already finished at step 4" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.steps is 9, but this run was started with 4"):
        train.main(["--dry-run", *words, "--train.steps", "9"])
    with pytest.raises(
        UserError, match=r"train\.precision is bf16 on this machine, the run was started with fp32"
    ):
        train.main(["--dry-run", "--gpus", "1", *words])
    with pytest.raises(UserError, match="checkpoints up to step 4"):
        train.main(["--dry-run", *words, "--resume", "none"])
    (tmp_path / "run" / "final.safetensors").unlink()
    before = contents(tmp_path)
    assert train.main(["--dry-run", "--data.cache_dir", str(tmp_path / "cache"), *words]) == 0
    assert "resume: continues after step 4 of 4" in capsys.readouterr().out
    assert contents(tmp_path) == before
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(UserError, match="another run is using this folder"):
        train.main(["--dry-run", *words])
    lock.release()


@pytest.mark.parametrize(
    "changes",
    [
        ["--data.shards", "nowhere", "--data.synthetic.images", "0"],
        ["--data.require_audit", "true"],
        ["--train.global_batch", "1024"],
        ["--model.weights", "nowhere.pt"],
        ["--train.profile", "2:900"],
        ["--data.generators", "[nobody]"],
        ["--optim.lr", "-1"],
        ["--optim.lx", "1"],
        ["--resume", "nowhere.pt"],
        ["--run.dir", "/dev/null/run"],
    ],
)
def test_the_error_is_the_run_s_own(words, changes, tmp_path):
    said = []
    for mode in (["--dry-run"], []):
        with pytest.raises(UserError) as caught:
            train.main([*mode, *words, *changes])
        said.append(caught.value.for_command_line())
        if mode:
            assert not list(tmp_path.iterdir())
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nodes", "2"], "nodes 2: only with --dry-run"),
        (["--rate", "9"], "rate 9.0: only with --dry-run"),
        (["--dry-run", "--nodes", "0"], "nodes 0: expected more than 0"),
        (["--dry-run", "--gpus", "x"], "gpus x: expected all, or a number"),
        (["--dry-rum"], "did you mean --dry-run"),
        (["--dry-run", "--gpus", "5"], "5 processes, but train.global_batch 16 has only 4"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(words, more, message):
    with pytest.raises(UserError, match=message):
        train.main([*words, *more])


def test_a_launcher_s_processes_are_the_machine(words, torchrun, repo_root, tmp_path):
    command = torchrun(2, "launch/train.py", "--dry-run", *words)
    done = subprocess.run(
        command, cwd=repo_root, env=environment(), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 1 node of 2 processes on the CPU, fp32") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (3, 5), (15, 16)])
def test_a_node_reads_the_shards_of_its_positions(tiny_shards, start, stop):
    shards = ShardSet(tiny_shards, "train")
    order = TrainingOrder(shards, DataConfig(shards=str(tiny_shards), window_shards=1), 0, 16)
    ids = np.concatenate([order.step_ids(step, start, stop) for step in range(order.steps_per_epoch)])
    # A window of one shard: what is read is what the samples lie in.
    assert order.shards_of(start, stop).tolist() == sorted(set(shards.rows[ids]["shard"].tolist()))


def test_durations_are_read_at_a_glance():
    said = [format_duration(seconds) for seconds in (3.2, 200, 9000, 300_000)]
    assert said == ["3 s", "3.3 min", "2.5 h", "3.5 days"]


def test_finetuning_is_planned_and_refused_alike(tmp_path, capsys):
    write_conversations(tmp_path)
    before = contents(tmp_path)
    words = finetuning_flags(tmp_path, tmp_path / "run")
    machine = ["--dry-run", "--nodes", "2", "--gpus", "2", "--rate", "0.5"]
    assert finetune_mlm.main([*machine, *words]) == 0
    said = capsys.readouterr().out
    assert "ZeRO-2 on 2 nodes of 2 GPUs, bf16" in said
    assert "data: 40 conversations, 8 for validation" in said
    assert "batch: 8 conversations a step; each of 4 processes has 2, in 2 passes of at most 1" in said
    assert "steps: 6" in said and "time: 24 s" in said
    assert finetune_mlm.main(["--dry-run", "--gpus", "16", *words]) == 0
    assert "8 processes have none" in capsys.readouterr().out
    for more, message in (
        (["--gpu-memory", "0.5"], "of memory are needed on each GPU"),
        (["--train.global_batch", "64"], "train.global_batch is 64, but .* has 40 conversations"),
        (["--model.weights", "nowhere"], "model.weights nowhere"),
        (["--tune.vision", "partial", "--tune.vision_from_layer", "9"], "tune.vision_from_layer is 9"),
        (["--data.max_length", "16"], "unusable samples"),
        (["--processes", "1", "--tune.language", "qlora"], "qlora, whose 4-bit kernels need a GPU"),
    ):
        machine = ["--dry-run", *([] if "--processes" in more else ["--gpus", "1"])]
        with pytest.raises(UserError, match=message):
            finetune_mlm.main([*machine, *words, *more])
    assert contents(tmp_path) == before
