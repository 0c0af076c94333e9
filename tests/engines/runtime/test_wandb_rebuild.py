"""A run's copy for Weights & Biases, made again from its folder and read back."""

import json
import shutil

import numpy as np
import pytest
import wandb
import yaml
from PIL import Image

from dataio.core.errors import UserError
from engines.runtime.run_folder import FolderLock
from engines.runtime.run_log import LogConfig, RunLog
from engines.runtime.wandb_rebuild import rebuild_run
from telltale.cli import find_module
from tests.wandb_file import read_wandb_file

SETTINGS = {
    "log": {"project": "tests", "group": "colors", "wandb": "offline", "artifacts": True},
    "optim": {"lr": 0.1},
    "data": {"shards": "nowhere"},
}


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    for name in ("API_KEY", "MODE", "RUN_ID", "RUN_GROUP", "SWEEP_ID", "NAME", "DIR", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def make_run(folder, mode):
    """Two starts, of which the first was killed."""
    (folder / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "images" / "curves.png")
    config = LogConfig(wandb=mode, project="tests", group="colors")
    log = RunLog(folder, config, SETTINGS, data="d1g3st")
    log.write({"kind": "train", "step": 1, "loss": 0.5}, {"seconds": 1.0})
    log.write({"kind": "val", "step": 1, "loss": 0.25})
    offset = log.committed_offset()
    log.write({"kind": "train", "step": 2, "loss": 99.0})
    log.close(75)
    log = RunLog(folder, config, SETTINGS, data="d1g3st", offset=offset, wandb_id=log.wandb_id)
    log.write({"kind": "train", "step": 2, "loss": 0.4})
    log.write({"kind": "val", "step": 2, "loss": 0.75})
    log.close(0)
    (folder / "final.safetensors").write_bytes(b"weights")
    (folder / "exit.json").write_text('{"code": 0, "message": "finished"}')
    wandb.teardown()
    return log.wandb_id


def test_a_run_in_parts_is_made_whole_under_its_id_and_again_alike(tmp_path):
    folder = tmp_path / "red"
    run_id = make_run(folder, "offline")
    made = rebuild_run(folder, "auto")
    assert (made.id, made.rows) == (run_id, 4) and made.offline is not None
    file = read_wandb_file(made.offline)
    assert (file.run.run_id, file.run.run_group, file.run.job_type) == (run_id, "colors", "training")
    assert (file.run.display_name, file.run.resume, file.exit_code) == ("red", False, 0)
    assert (
        file.config["optim"] == {"lr": 0.1} and file.config["data_digest"] == "d1g3st" and file.config["code"]
    )
    assert file.values("train/loss") == {1: 0.5, 2: 0.4} and file.values("val/loss") == {1: 0.25, 2: 0.75}
    assert file.values("perf/seconds") == {1: 1.0} and file.metrics["val/*"] == "step"
    assert file.summary["best/loss"] == 0.25 and file.values("images/curves._type") == {2: "image-file"}
    pictures = list(made.offline.rglob("curves*.png"))
    assert len(pictures) == 1 and pictures[0].read_bytes() == (folder / "images" / "curves.png").read_bytes()
    assert [artifact.type for artifact in file.artifacts] == ["model"]
    before = sorted(str(path) for path in folder.rglob("*") if "wandb-sync" not in str(path))
    again = rebuild_run(folder, "offline")
    assert again.id == run_id
    # One copy, not two.
    second = read_wandb_file(folder / "wandb-sync")
    assert [(row["_step"], row.get("train/loss")) for row in second.history] == [(1, 0.5), (2, 0.4)]
    assert before == sorted(str(path) for path in folder.rglob("*") if "wandb-sync" not in str(path))


def test_a_run_without_wandb_gets_an_id_that_lasts(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, "off")
    assert not (folder / "wandb.json").exists()
    first = rebuild_run(folder, "offline")
    assert len(first.id) == 8 and json.loads((folder / "wandb.json").read_text())["id"] == first.id
    # A continuation is the same run.
    log = RunLog(folder, LogConfig(wandb="offline"), SETTINGS, offset=10**6)
    log.close(0)
    assert log.wandb_id == first.id == rebuild_run(folder, "offline").id


def test_what_is_no_run_and_a_live_run_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no config.yaml, expected the folder of a run"):
        rebuild_run(tmp_path, "offline")
    folder = tmp_path / "run"
    make_run(folder, "off")
    lock = FolderLock(folder)
    with pytest.raises(UserError, match="another run is using this folder"):
        rebuild_run(folder, "offline")
    lock.release()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="WANDB_MODE is disabled"):
        rebuild_run(folder, "auto")
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read \('kind'\)"):
        rebuild_run(folder, "offline")


def test_a_failure_leaves_the_earlier_copy(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, "off")
    made = rebuild_run(folder, "offline")
    (folder / "wandb.json").unlink()
    (folder / "wandb.json").mkdir()
    with pytest.raises(UserError, match="was not sent"):
        rebuild_run(folder, "offline")
    assert made.offline is not None and read_wandb_file(made.offline).exit_code == 0
    shutil.rmtree(folder / "wandb.json")


def test_the_command(tmp_path, capsys):
    from launch.wandb_sync import main

    assert find_module("wandb") == "wandb_sync"
    make_run(tmp_path / "run", "off")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no config.yaml"):
        main(["sync", str(tmp_path / "empty"), str(tmp_path / "run"), "--mode", "offline"])
    [first, second] = capsys.readouterr().out.splitlines()
    assert first.endswith("4 lines of metrics") and second.startswith("to upload it: wandb sync ")
    assert read_wandb_file(tmp_path / "run" / "wandb-sync").values("val/loss") == {1: 0.25, 2: 0.75}
