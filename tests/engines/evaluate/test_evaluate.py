"""What evaluate.py does round the model; the model's part is in tests/integration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataio.core.errors import UserError
from engines.evaluate.evaluate import check_writable, write_metrics


def test_a_folder_that_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "a" / "b"))
    check_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def _is_a_file(folder: Path) -> Path:
    (folder / "output").write_text("")
    return folder / "output"


def _below_a_file(folder: Path) -> Path:
    return _is_a_file(folder) / "evaluation"


def _dangling_link(folder: Path) -> Path:
    (folder / "output").symlink_to(folder / "nowhere")
    return folder / "output"


def _taken_name(folder: Path) -> Path:
    (folder / "metrics.json").mkdir()
    return folder


def _kernel_folder(folder: Path) -> Path:
    # Nobody can make files here, not even root.
    return Path("/proc/evaluation")


CASES = [_is_a_file, _below_a_file, _dangling_link, _taken_name, _kernel_folder]


@pytest.mark.parametrize("make", CASES)
def test_unwritable_output_is_one_line(tmp_path: Path, make) -> None:
    output = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        check_writable(str(output))
    message = str(caught.value)
    assert message.startswith(f"output {output}: cannot be written (") and "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="ermission denied"):
        check_writable(str(tmp_path / "evaluation"))


def test_metrics_are_replaced_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    write_metrics(path, {"overall": {"auroc": None}})
    assert json.loads(path.read_text()) == {"overall": {"auroc": None}}
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(path, {"overall": {"auroc": float("nan")}})
    assert json.loads(path.read_text()) == {"overall": {"auroc": None}}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "best.pt"], ["data", "split", "output"]),
        (
            ["--checkpoint", "c", "--data", "d", "--split", "test", "--output", "o", "--batch", "0"],
            ["--batch", "0"],
        ),
        (
            ["--checkpoint", "c", "--data", "d", "--split", "test", "--output", "best.pt/x"],
            ["--output best.pt/x"],
        ),
        (["--check", "c", "--data", "d", "--split", "test", "--output", "o"], ["--check"]),
    ],
)
def test_command_says_what_is_wrong_in_one_line(tmp_path: Path, repo_root: Path, flags, words) -> None:
    (tmp_path / "best.pt").write_text("")
    command = [sys.executable, str(repo_root / "launch" / "evaluate.py"), *flags]
    # From another folder, as a person may start it.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]
