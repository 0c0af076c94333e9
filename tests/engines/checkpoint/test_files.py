"""Checkpoints are complete or not there; damage is found and survived."""

import os

import pytest
import torch

from dataio.core.atomic import write_with
from dataio.core.errors import UserError
from engines.checkpoint.files import CheckpointFolder, load, save

HEADER = {"format": "telltale-checkpoint", "version": 1}


def state(step):
    torch.manual_seed(step)
    return {**HEADER, "step": step, "model": {"w": torch.randn(50, 50)}, "best": {"score": 0.5}}


@pytest.fixture
def folder(tmp_path):
    store = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        store.save(step, state(step))
    return store


def test_the_last_two_are_kept_and_the_newest_is_found(folder):
    assert folder.steps() == [20, 30]
    found = folder.load_newest(pytest.fail)
    assert found["step"] == 30
    assert torch.equal(found["model"]["w"], state(30)["model"]["w"])


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(folder, damage):
    path = folder.path(30)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    said: list[str] = []
    assert folder.load_newest(said.append)["step"] == 20
    assert len(said) == 1 and "step_00000030.pt" in said[0] and "damaged" in said[0]


def test_no_flipped_bit_passes_that_changes_what_is_read(tmp_path):
    path = tmp_path / "step_00000001.pt"
    weights, others = torch.arange(64.0), {**HEADER, "step": 1, "best": {"score": 0.5}}
    save(path, {**others, "model": {"w": weights}})
    whole = path.read_bytes()
    silent = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = load(path)
        except UserError:
            continue
        silent += 1  # padding, dates and the like
        assert torch.equal(found.pop("model")["w"], weights) and found == others, place
    assert silent < len(whole) / 3


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder belongs")
    with pytest.raises(UserError, match=r"checkpoints: checkpoints cannot be written there \(File exists\)"):
        CheckpointFolder(tmp_path / "checkpoints", keep=2).prepare()


def test_all_damaged_is_refused(folder):
    for step in folder.steps():
        folder.path(step).write_bytes(b"PK")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged; start again with resume none"):
        folder.load_newest(lambda text: None)


def test_leftovers_of_a_killed_save_are_ignored_and_cleared(folder):
    leftover = folder.folder / ".step_00000040.pt.tmp"
    leftover.write_bytes(b"half")
    assert folder.steps() == [20, 30]
    folder.prepare()
    assert not leftover.exists()


def test_a_failing_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_with(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    torch.save({**HEADER, "step": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a telltale checkpoint"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_other_files_are_refused_by_name(tmp_path):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not a telltale checkpoint"):
        load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    save(tmp_path / "new.pt", {"format": "telltale-checkpoint", "version": 2})
    with pytest.raises(UserError, match="version 2, this telltale reads 1"):
        load(tmp_path / "new.pt")
