"""launch/grid.py: every combination trained by the real command, one table, failures in it."""

import csv
import subprocess
import sys

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dataio.core.errors import UserError
from engines.config.detector import parse_config
from engines.experiments.grid import format_grid, read_grid
from engines.runtime.run_log import sweep_run_folder
from tests.support import alive, command_line, descendants, environment, flags, wait_until


def sweep_file(tmp_path, **changes):
    sweep = {
        "method": "grid",
        "parameters": {
            "config": {"value": "configs/quickstart.yaml"},
            "optim.lr": {"values": [0.005, 0.01]},
            "train.steps": {"values": [2, 3]},
        },
        **changes,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_grid_trains_all_continues_where_it_was_and_says_what_failed(run, repo_root, tmp_path, tiny_shards):
    parameters = {
        "config": {"value": "configs/quickstart.yaml"},
        "train.steps": {"value": 3},
        "optim.lr": {"values": [0.005, -1]},
    }
    sweep = sweep_file(tmp_path, parameters=parameters)
    tiny = flags(data__shards=tiny_shards)
    position = tiny.index("--optim.lr")
    command = [sys.executable, str(repo_root / "launch/grid.py"), str(sweep), "--output", "grid"]
    command += [*tiny[:position], *tiny[position + 2 :], "--weights", "last"]
    done = run(command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "1 of 2 runs failed, lr-1 first" in done.stderr
    assert "failed: optim.lr is -1.0, expected a number above 0" in done.stdout
    rows = list(csv.DictReader((tmp_path / "grid" / "grid.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["lr0.005", "lr-1"]
    assert rows[0]["steps"] == "3" and 0 <= float(rows[0]["test_real_fake_error"]) <= 1
    assert float(rows[0]["val_generator_error"]) >= 0 and rows[1]["failure"]
    assert sorted(log.name for log in (tmp_path / "grid").glob("*.log")) == ["lr-1.log", "lr0.005.log"]
    metrics = tmp_path / "grid" / "lr0.005" / "metrics.jsonl"
    before = metrics.read_bytes()
    assert run(command).stdout == done.stdout and metrics.read_bytes() == before


def test_combinations_are_all_and_named_by_what_varies(tmp_path):
    found = read_grid(sweep_file(tmp_path))
    assert [c.name for c in found] == [
        "lr0.005_steps2",
        "lr0.005_steps3",
        "lr0.01_steps2",
        "lr0.01_steps3",
    ]
    assert found[1].flags() == ["--config=configs/quickstart.yaml", "--optim.lr=0.005", "--train.steps=3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "method is 'bayes', only grid runs without an account"),
        ({"parameters": {}}, None),
        ({"parameters": [1]}, "no parameters, expected a sweep file"),
        (
            {"parameters": {"optim.lr": {"min": 0.1}}},
            r"parameters\.optim\.lr is .*expected value: x or values",
        ),
        ({"parameters": {"optim.lr": {"values": [1, 1]}}}, "two combinations are called lr1"),
    ],
)
def test_sweep_files_that_do_not_fit(tmp_path, changes, message):
    path = sweep_file(tmp_path, **changes)
    if message is None:
        assert [c.name for c in read_grid(path)] == ["run"]
        return
    with pytest.raises(UserError, match=message):
        read_grid(path)


def test_shipped_sweeps_are_grids_of_configurations_that_exist(repo_root):
    for path in [*repo_root.glob("configs/sweeps/*.yaml"), *repo_root.glob("configs/reference/*grid*.yaml")]:
        for combination in read_grid(path):
            assert (repo_root / combination.settings["config"]).is_file()


def test_a_sweeps_agent_gets_a_folder_of_its_own(monkeypatch):
    assert sweep_run_folder("runs/x") == "runs/x"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    assert sweep_run_folder("runs/x") == "runs/x/r7"


def test_the_flags_that_a_sweeps_agent_writes_are_understood(repo_root):
    chosen = {
        "config": "configs/quickstart.yaml",
        "optim.lr": 1e-05,
        "optim.schedule": "cosine",
        "model.whiten": True,
        "train.steps": 7,
        "data.generators": ["adm", "glide"],
    }
    # What `wandb agent` puts for ${args}.
    written = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})[
        "args"
    ]
    assert "--optim.lr=1e-05" in written and "--data.generators=['adm', 'glide']" in written
    config = parse_config(written, "unused.yaml")
    assert (config.optim.lr, config.optim.schedule, config.model.whiten) == (1e-05, "cosine", True)
    assert (config.train.steps, list(config.data.generators)) == (7, ["adm", "glide"])
    sweep = yaml.safe_load((repo_root / "configs" / "sweeps" / "quickstart.yaml").read_text())
    command = create_sweep_command(sweep["command"])
    assert command[0] == "${env}" and command[-2:] == ["${program}", "${args}"]
    assert (repo_root / sweep["program"]).is_file()


def test_the_table_leaves_unknown_errors_open():
    row = {"name": "a", "failure": "", "steps": 2, "val_real_fake_error": 0.125, "val_object_error": None}
    text = format_grid([row], "test")
    assert " 12.50      -      -      -" in text


def test_a_killed_grids_run_dies_with_it(repo_root, tmp_path):
    code = (
        "import sys, pathlib; from engines.experiments.grid import _call; "
        "_call(['-c', 'import time; time.sleep(300)'], pathlib.Path(sys.argv[1]), 'w')"
    )
    grid = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], cwd=repo_root, env=environment()
    )

    def runs():
        # Importing starts short-lived programs, too; and a fork is its parent until it has its own command.
        return [
            pid for pid in descendants(grid.pid) if command_line(pid)[-1:] == ["import time; time.sleep(300)"]
        ]

    wait_until(lambda: bool(runs()), 120, "the run's program")
    (child,) = runs()
    grid.kill()
    grid.wait()
    wait_until(lambda: not alive(child), 20, "the run's end")
