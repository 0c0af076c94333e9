"""From a configuration to an sbatch command, without a Slurm (tests/slurm/ has one)."""

import shutil
import subprocess
import sys

import pytest

from dataio.core.errors import UserError
from engines.cluster.submit import (
    DETECTOR,
    FINETUNE,
    Request,
    command_of,
    explain,
    plan_job,
    read_site,
    script_of,
    submit,
)
from engines.config.parser import split_known_flags

CONFIG = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    for name in ("TELLTALE_SITE", "SBATCH_PARTITION", "SBATCH_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)


def test_every_configuration_finds_its_script(repo_root):
    for path in sorted((repo_root / "configs").glob("*.yaml")):
        expected = FINETUNE if path.name.startswith("tinyllava") else DETECTOR
        assert script_of(str(path)) == expected and (repo_root / expected).is_file()


def test_options_become_sbatch_s_and_flags_the_training_s(repo_root):
    own, flags = split_known_flags(
        ["configs/x.yaml", "--nodes", "4", "--optim.lr", "0.4", "--dry-run", "--train.epochs=2"]
    )
    assert own == ["configs/x.yaml", "--nodes", "4", "--dry-run"]
    assert flags == ["--optim.lr", "0.4", "--train.epochs=2"]
    request = Request(
        CONFIG, nodes=4, time="1:00:00", account="a b", sbatch="--exclude=n3 --nice", flags=tuple(flags)
    )
    words = command_of(request, repo_root)
    assert words[:6] == ["sbatch", "--nodes=4", "--time=1:00:00", "--account=a b", "--exclude=n3", "--nice"]
    assert words[6:] == [str(repo_root / DETECTOR), "--config", CONFIG, *flags]
    assert "'--account=a b'" in explain(words, {})


def test_a_part_of_a_node_overrides_the_script_s_whole_one(repo_root):
    words = command_of(Request(CONFIG, gpus=2, mem="100G"), repo_root)
    assert words[2:6] == ["--oversubscribe", "--gpus-per-node=2", "--cpus-per-task=16", "--mem=100G"]
    words = command_of(Request(CONFIG, gpus=2), repo_root, "gpu:a100")
    assert words[2:4] == ["--oversubscribe", "--gres=gpu:a100:2"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 0}, "nodes 0: expected 1 or more"),
        ({"gpus": 0}, "gpus 0: expected 1 or more"),
        ({"mem": "3G"}, "mem: only with gpus"),
        ({"flags": ("--optim.lx", "1")}, "--optim.lx"),
        ({"flags": ("--optim.lr", "-1")}, "optim.lr is -1"),
        ({"experiment": "README.md"}, "README.md: cannot be read as YAML"),
        ({"experiment": "configs/sweeps/quickstart.yaml"}, "not an experiment's configuration"),
        ({"experiment": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ],
)
def test_what_would_fail_in_the_job_is_refused_before_it_is_queued(repo_root, changes, said):
    with pytest.raises(UserError) as caught:
        command_of(Request(**{"experiment": CONFIG, **changes}), repo_root)
    assert said in str(caught.value)


def test_the_site_s_file_is_bash_and_the_environment_wins(tmp_path, monkeypatch):
    site = tmp_path / "site.env"
    site.write_text(
        'SBATCH_PARTITION=gpu\nSBATCH_ACCOUNT=a\nTELLTALE_MODULES="one two" # both\nOTHER=1\necho noise\n'
    )
    monkeypatch.setenv("TELLTALE_SITE", str(site))
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    found = read_site(tmp_path)
    assert found == {"SBATCH_PARTITION": "gpu", "TELLTALE_MODULES": "one two"}
    assert explain(["sbatch", "x"], found) == "SBATCH_PARTITION=gpu TELLTALE_MODULES='one two' sbatch x"
    site.write_text("if\n")
    with pytest.raises(UserError, match=r"site\.env: bash cannot read it"):
        read_site(tmp_path)
    site.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_site(tmp_path)


def test_the_example_is_a_site_file_that_sets_nothing(repo_root, monkeypatch):
    monkeypatch.setenv("TELLTALE_SITE", str(repo_root / "slurm" / "site.env.example"))
    assert read_site(repo_root) == {}


def test_without_slurm_the_message_says_how_to_train_here(repo_root, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"no Slurm.*torchrun .*launch/train\.py --config configs/quickstart\.yaml"
    ):
        submit(["sbatch"], Request(CONFIG), repo_root, {})


def test_a_dry_run_shows_the_command_and_what_it_would_do(repo_root, tmp_path):
    options = ["--nodes", "2", "--node-gpus", "2", "--dry-run"]
    changes = [
        "--optim.lr",
        "0.1",
        "--run.dir",
        str(tmp_path / "run"),
        "--data.shards",
        str(tmp_path / "none"),
    ]
    done = subprocess.run(
        [sys.executable, "launch/submit.py", CONFIG, *options, *changes],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    command, *plan = done.stdout.splitlines()
    assert command.endswith(f"sbatch --nodes=2 {repo_root / DETECTOR} --config {CONFIG} {' '.join(changes)}")
    assert f"{tmp_path / 'run'}: resnet18 on 2 nodes of 2 GPUs" in plan[0]
    assert "each of 4 processes has 1, in 1 pass of at most 32 images" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_ends_as_the_job_would(repo_root, tmp_path):
    request = Request(
        CONFIG, flags=("--run.dir", str(tmp_path / "run"), "--data.shards", str(tmp_path / "none"))
    )
    with pytest.raises(UserError, match=r"8 processes, but train\.global_batch 128 has only 4 micro-batches"):
        plan_job(request, repo_root, 8, None, None)
    assert "on 1 node of 1 process on the CPU" in plan_job(request, repo_root, 0, None, None)
    with pytest.raises(UserError, match=r"rate -1\.0: expected more than 0"):
        plan_job(request, repo_root, 0, -1.0, None)
