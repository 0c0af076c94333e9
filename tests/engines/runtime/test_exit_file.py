"""RUN/exit.json, and what a worker makes of it that torchrun started again in vain."""

import subprocess
import sys

import pytest

from engines.runtime.exit_file import guess_run_folder, previous_exit_code, read_exit, write_exit
from tests.support import environment


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ([], "runs/default_file"),
        (["--config", "other.yaml"], "runs/other"),
        (["--config=other.yaml"], "runs/other"),
        (["--run.dir", "mine", "--config", "other.yaml"], "mine"),
        (["--config", "other.yaml", "--run.dir=mine"], "mine"),
        (["--config", "missing.yaml"], None),
        (["--config"], None),
        (["--run.dir"], None),
    ],
)
def test_the_run_folder_is_guessed_without_checking_anything(tmp_path, monkeypatch, words, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default.yaml").write_text("run: {dir: runs/default_file}\noptim: {nonsense: 1}\n")
    (tmp_path / "other.yaml").write_text("run: {dir: runs/other}\n")
    found = guess_run_folder(words, tmp_path / "default.yaml")
    assert (None if found is None else str(found)) == folder


@pytest.mark.parametrize(("code", "left"), [(75, 75), (2, 2), (0, None), (1, None)])
def test_a_restarted_worker_leaves_at_once_where_the_run_has_its_verdict(tmp_path, monkeypatch, code, left):
    write_exit(tmp_path, code, "why", "SIGTERM" if code == 75 else "")
    words = ["--run.dir", str(tmp_path)]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert previous_exit_code(words, tmp_path / "none.yaml") is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert previous_exit_code(words, tmp_path / "none.yaml") == left


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"code": "2"}'])
def test_a_verdict_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "exit.json").write_text(content)
    assert read_exit(tmp_path) is None


@pytest.mark.parametrize(("told", "code"), [("file", 0), ("", 2)])
def test_under_a_script_that_reads_the_verdict_a_refusal_leaves_quietly(repo_root, tmp_path, told, code):
    command = [
        sys.executable,
        str(repo_root / "launch/train.py"),
        "--run.dir",
        str(tmp_path),
        "--optim.lr",
        "-1",
    ]
    env = {**environment(), "TELLTALE_VERDICT": told}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "optim.lr is -1" in done.stderr
    verdict = read_exit(tmp_path)
    assert verdict is not None and verdict["code"] == 2 and "optim.lr" in verdict["message"]
