"""What Weights & Biases gets of a run, read back from the file that an offline run leaves."""

import json
import math

import pytest
import wandb

from engines.runtime.command import NonFiniteError
from engines.runtime.run_log import LogConfig, RunLog
from tests.wandb_file import read_wandb_file

SETTINGS = {"optim": {"lr": 0.1}, "data": {"shards": "data/x"}}


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    for name in ("API_KEY", "MODE", "RUN_ID", "RUN_GROUP", "SWEEP_ID", "NAME", "DIR", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def begin(folder, **more):
    folder.mkdir(exist_ok=True)
    config = LogConfig(wandb="offline", project="tests", **more.pop("config", {}))
    return RunLog(folder, config, SETTINGS, data="d1g3st", **more)


def train(log, steps):
    for step in steps:
        log.write({"kind": "train", "step": step, "loss": 1 / step, "object_error": None}, {"seconds": 0.5})


def files_of(folder):
    wandb.teardown()  # its process writes the rest when it ends
    found = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [read_wandb_file(path) for path in found]


def test_a_run_says_what_it_is_and_draws_its_metrics_against_the_step(tmp_path):
    log = begin(tmp_path / "red", config={"group": "colors"})
    train(log, [10, 20])
    log.write({"kind": "val", "step": 20, "loss": 0.3, "generator_error": 0.25}, {"seconds": 9.0})
    log.write({"kind": "val", "step": 30, "loss": 0.4, "generator_error": 0.125})
    log.close(0)
    [file] = files_of(tmp_path / "red")
    assert (file.run.display_name, file.run.run_group, file.run.job_type) == ("red", "colors", "training")
    assert (file.run.project, file.run.run_id) == ("tests", log.wandb_id) and file.exit_code == 0
    assert file.config["optim"] == {"lr": 0.1} and file.config["data_digest"] == "d1g3st"
    assert set(file.config["code"]) == {"version", "commit"}
    assert file.metrics.items() >= {"step": "", "train/*": "step", "val/*": "step", "perf/*": "step"}.items()
    assert file.values("train/loss") == {10: 0.1, 20: 0.05} and file.values("step") == {
        10: 10,
        20: 20,
        30: 30,
    }
    assert file.values("val/generator_error") == {20: 0.25, 30: 0.125}
    assert file.values("perf/seconds") == {10: 0.5, 20: 0.5} and file.values("perf/val_seconds") == {20: 9.0}
    assert "train/object_error" not in file.summary
    # The best of each, and the last.
    assert (file.summary["best/loss"], file.summary["best/generator_error"]) == (0.3, 0.125)
    assert (file.summary["val/loss"], file.alerts) == (0.4, [])


def test_offline_a_continuation_is_another_file_of_the_same_run(tmp_path):
    folder = tmp_path / "run"
    log = begin(folder)
    train(log, [1])
    log.write({"kind": "val", "step": 1, "loss": 0.25})
    offset = log.committed_offset()
    train(log, [2])  # lost, as if killed: no checkpoint knows of it
    log.close(75)
    again = begin(folder, offset=offset, wandb_id=log.wandb_id)
    train(again, [2, 3])
    again.write({"kind": "val", "step": 3, "loss": 0.5})
    again.close(0)
    first, second = files_of(folder)
    assert first.run.run_id == second.run.run_id == log.wandb_id == again.wandb_id
    # `wandb sync` appends a file with this mark to what it has of the run.
    assert first.run.resume and second.run.resume
    assert set(first.values("train/loss")) == {1, 2} and set(second.values("train/loss")) == {2, 3}
    assert second.summary["best/loss"] == 0.25  # of the first part


def test_the_id_is_the_folders_even_where_no_checkpoint_knows_it(tmp_path):
    first = begin(tmp_path / "run")
    first.close(1)
    again = begin(tmp_path / "run")
    again.close(0)
    assert again.wandb_id == first.wandb_id == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    # Another run's checkpoint in a new folder begins another run.
    other = begin(tmp_path / "other", offset=100, wandb_id=first.wandb_id)
    other.close(0)
    assert other.wandb_id != first.wandb_id


def test_a_run_begun_before_there_was_the_file_keeps_the_checkpoints_id(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    log = begin(tmp_path, offset=42, wandb_id="old00000")
    log.close(0)
    assert log.wandb_id == "old00000"


def test_a_run_of_a_sweeps_agent_is_the_agents(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    (tmp_path / "base").mkdir()
    wandb.teardown()  # it reads the environment once in a process
    log = begin(tmp_path / "base" / "r7")
    log.close(0)
    [file] = files_of(tmp_path / "base" / "r7")
    assert (file.run.run_id, file.run.run_group, file.run.sweep_id) == ("r7", "base", "s1")


@pytest.mark.parametrize(
    ("error", "title"),
    [
        (NonFiniteError("step 7: the loss is not finite"), "run: not finite"),
        (RuntimeError("a\nbug"), "run: failed"),
    ],
)
def test_an_error_is_an_alert(tmp_path, error, title):
    log = begin(tmp_path / "run")
    with pytest.raises(type(error)):
        try:
            raise error
        finally:
            log.close(1)
    [file] = files_of(tmp_path / "run")
    [(sent, text, level)] = file.alerts
    assert (sent, level) == (title, "ERROR") and type(error).__name__ in text and file.exit_code == 1
    assert "\n" not in text


def test_a_request_to_stop_is_no_alert_and_a_skipped_step_is_one(tmp_path):
    log = begin(tmp_path / "run")
    for step, skipped in ((1, 0), (2, 1), (3, 1)):
        log.write({"kind": "train", "step": step, "loss": 1.0, "skipped": skipped})
    log.close(75)
    [file] = files_of(tmp_path / "run")
    assert [(title, level) for title, _, level in file.alerts] == [("run: not finite", "WARN")]


def test_weights_and_shards_are_artifacts_by_reference(tmp_path):
    folder, shards = tmp_path / "run", tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text("{}")
    folder.mkdir()
    config = LogConfig(wandb="offline", artifacts=True)
    log = RunLog(folder, config, {"data": {"shards": str(shards)}})
    (folder / "best.pt").write_bytes(b"x" * 1000)
    log.close(0)
    [file] = files_of(folder)
    found = {artifact.type: artifact.manifest.contents for artifact in file.artifacts}
    [data], [weights] = found["dataset"], found["model"]
    assert weights.ref == (folder / "best.pt").as_uri() and data.ref == (shards / "manifest.json").as_uri()
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and b"x" * 1000 in path.read_bytes()]
    assert copies == [folder / "best.pt"]


def test_without_the_flag_nothing_is_an_artifact_and_off_leaves_nothing(tmp_path):
    log = begin(tmp_path / "run")
    log.close(0)
    [file] = files_of(tmp_path / "run")
    assert file.artifacts == []
    quiet = RunLog(tmp_path, LogConfig(wandb="off"), SETTINGS)
    quiet.close(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run"]


def test_a_failure_of_wandb_is_one_warning(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb.json").mkdir()  # cannot be written
    log = begin(folder)
    train(log, [1, 2])
    log.write({"kind": "val", "step": 2, "loss": math.nan})
    log.close(0)
    assert [record.message.split(" failed")[0] for record in caplog.records] == ["starting Weights & Biases"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_damaged_file_of_metrics_stops_no_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("[1]\n\0\0\n")
    log = begin(tmp_path, offset=100)
    train(log, [1])
    log.close(0)
    assert [record.message.split(" (")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "metrics.jsonl: cannot be read"
    ]
    [file] = files_of(tmp_path)
    assert file.values("train/loss") == {1: 1.0}


def test_without_a_server_an_online_run_is_logged_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()
    log = RunLog(tmp_path, LogConfig(), SETTINGS)
    train(log, [1, 2])
    log.close(0)
    [file] = files_of(tmp_path)
    assert file.run.run_id == log.wandb_id and set(file.values("train/loss")) == {1, 2}
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("Weights & Biases could not be started online (") and warning.endswith(
        "sync` later"
    )


def test_tensorboard_has_each_step_once_after_a_continuation(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = LogConfig(wandb="off", tensorboard=True)
    log = RunLog(tmp_path, config, SETTINGS)
    train(log, [1, 2])
    offset = log.committed_offset()
    train(log, [3, 4])
    log.close(75)
    again = RunLog(tmp_path, config, SETTINGS, offset=offset)
    train(again, [3, 4, 5])
    again.close(0)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in events.Scalars("perf/seconds")] == [0.5] * 5
