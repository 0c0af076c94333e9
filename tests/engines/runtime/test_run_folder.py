"""A run's folder: its lock, and exit.json after every kind of end."""

import pytest
import torch

from dataio.core.errors import UserError
from engines.runtime.distributed import World
from engines.runtime.exit_file import read_exit
from engines.runtime.run_folder import FolderLock, Outcome, refuse_to_start_over, run_in_folder
from engines.runtime.watchdog import LostRankError

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), distributed=False)


def failing(error):
    def run():
        raise error

    return run


def test_the_outcome_is_written_and_returned(tmp_path):
    folder = tmp_path / "new" / "run"
    assert run_in_folder(folder, ALONE, lambda: Outcome(75, "stopped", "SIGTERM")) == 75
    assert read_exit(folder) == {"code": 75, "message": "stopped", "reason": "SIGTERM"}


def test_the_exit_and_stop_files_of_an_earlier_run_are_removed(tmp_path, monkeypatch):
    monkeypatch.delenv("TELLTALE_VERDICT", raising=False)
    for name in ("exit.json", "stop"):
        (tmp_path / name).write_text("{}")
    seen: list[str] = []

    def run():
        seen.extend(path.name for path in tmp_path.iterdir() if path.name != ".lock")
        return Outcome(0, "finished")

    assert run_in_folder(tmp_path, ALONE, run) == 0
    assert seen == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("expected 1", field="run.seed", value=2), 2, "--run.seed 2: expected 1"),
        (RuntimeError("broken"), 1, "a programming error; see the log"),
    ],
)
def test_an_error_is_written_and_goes_on(tmp_path, error, code, message):
    with pytest.raises(type(error)):
        run_in_folder(tmp_path, ALONE, failing(error))
    assert read_exit(tmp_path) == {"code": code, "message": message}


def test_an_interrupted_run_says_so_and_how_it_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_in_folder(tmp_path, ALONE, failing(KeyboardInterrupt()))
    message = "interrupted; run the same command to continue"
    assert read_exit(tmp_path) == {"code": 130, "message": message, "reason": "SIGINT"}


def test_a_lost_rank_ends_the_run_with_code_1(tmp_path, capsys):
    assert run_in_folder(tmp_path, ALONE, failing(LostRankError("rank 1 has ended"))) == 1
    assert read_exit(tmp_path) == {"code": 1, "message": "rank 1 has ended; run the same command to continue"}
    assert capsys.readouterr().err.startswith("error: rank 1 has ended")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match=r"another run is using this folder \(pid \d+ on .*choose another"):
        FolderLock(tmp_path, wait_seconds=0)
    lock.release()
    FolderLock(tmp_path, wait_seconds=0).release()


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir .*file/run: cannot be written \(Not a directory\)"):
        run_in_folder(tmp_path / "file" / "run", ALONE, lambda: Outcome(0, ""))


def test_starting_over_needs_a_folder_without_checkpoints(tmp_path):
    refuse_to_start_over(tmp_path, [])
    with pytest.raises(UserError, match=r"resume none: .* holds checkpoints up to step 8"):
        refuse_to_start_over(tmp_path, [4, 8])
