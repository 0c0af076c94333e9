"""The console script: commands, their help without heavy imports, suggestions, exit codes."""

import subprocess
import sys

import pytest

from telltale.cli import COMMANDS, find_module, help_text

NAMES = [name for group in COMMANDS.values() for name in group]
HEAVY = ["torch", "pandas", "sklearn", "transformers", "nvidia", "matplotlib", "deepspeed", "scipy"]
# Runs a command's help in this process, then names what it has imported.
PROBE = f"""
import sys
from telltale.cli import main
try:
    main()
finally:
    print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def telltale(root, *words):
    command = [sys.executable, "-m", "telltale", *map(str, words)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def last_line(done):
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)], ids=" ".join)
def test_help_has_examples_and_imports_nothing_heavy(words, repo_root):
    command = [sys.executable, "-c", PROBE, *words, "--help"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "imported:\n"
    if words:
        assert f"telltale {words[0]}" in done.stdout.split("Examples:")[1]
        assert "usage:" in done.stdout


def test_the_list_names_every_command_once(repo_root):
    lines = [line.split()[0] for line in help_text().splitlines() if line.startswith("  ")]
    assert lines == NAMES
    files = {path.stem for path in (repo_root / "launch").glob("*.py")} - {"__init__"}
    assert {find_module(name) for name in NAMES} == files
    assert find_module("finetune_mlm") == "finetune_mlm"
    assert telltale(repo_root).stdout.rstrip() == help_text()


CASES = [
    (["trian"], "trian: no such command; did you mean train?"),
    (["qqqq"], "qqqq: no such command (see telltale --help)"),
    (["train", "--optim.lrr", "3"], "--optim.lrr 3; did you mean --optim.lr?"),
    (["train", "--lr", "3"], "did you mean --optim.lr?"),
    (["train", "--optim.name", "sdg"], "did you mean sgd?"),
    (["train", "--model.backbone", "resnet51"], "'resnet51', expected one such as resnet50"),
    (["shard", "--layout", "genimag"], "did you mean genimage?"),
    (["shard", "--codec.preset", "kepe"], "did you mean keep?"),
    (["evaluate", "--chekpoint", "x"], "--checkpoint"),
    (["predict", "photos"], "required: --checkpoint"),
    (["calibrate", "--data", "x"], "required: --checkpoint"),
    (["train", "--optim.lr", "abc"], '"optim.lr": expected float. Got value: abc'),
    (["train", "--config", "configs"], "is a folder, expected a YAML file"),
]


@pytest.mark.parametrize(("words", "message"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_a_mistyped_word_is_answered_with_the_nearest_right_one(words, message, repo_root):
    done = telltale(repo_root, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in last_line(done), done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "did you mean optim.lr?"),
        ("optimm: {lr: 1}", "did you mean optim"),
        ("data: {synthetic: {imagess: 1}}", "did you mean data.synthetic.images?"),
    ],
)
def test_a_mistyped_key_of_a_file_is_answered_with_the_nearest_right_one(text, message, repo_root, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    done = telltale(repo_root, "train", "--config", file)
    assert done.returncode == 2
    assert last_line(done).startswith(f"error: {file}: ") and message in last_line(done)
