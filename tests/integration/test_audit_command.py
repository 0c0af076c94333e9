"""launch/audit.py as a user starts it, and what launch/train.py makes of its verdict."""

import json
import shutil
import sys

import pytest

from tests.support import flags

WORDS = ["--sample", "60", "--workers", "1"]


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy: the audit's verdict goes beside the manifest."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


@pytest.fixture
def audit(run, repo_root):
    return lambda *words: run([sys.executable, str(repo_root / "launch" / "audit.py"), *map(str, words)])


@pytest.mark.slow
def test_training_says_the_verdict_and_refuses_where_it_must(audit, run, shards, repo_root, tmp_path):
    words = flags(data__shards=shards, run__dir=tmp_path / "run", train__steps=1)
    train = [sys.executable, str(repo_root / "launch" / "train.py"), *words, "--data.require_audit", "true"]
    refused = run(train)
    assert refused.returncode == 2
    message = f"data.require_audit: none of {shards}; run `telltale audit --shards {shards}`"
    assert refused.stderr.splitlines()[-1] == f"error: {message}"
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 2, "message": message}

    done = audit("--shards", shards, *WORDS)
    assert done.returncode == 0, done.stderr
    stored = json.loads((shards / "audit.json").read_text())
    assert stored["verdict"] in ("warn", "pass") and isinstance(stored["reasons"], list)
    assert f"verdict: {stored['verdict'].upper()}" in done.stdout
    assert done.stdout.endswith(f"written: {shards / 'audit.json'}\n")

    trained = run(train)
    assert trained.returncode == 0, trained.stderr
    assert f"audit: {stored['verdict']}: " in trained.stdout
    assert trained.stdout.count("audit: ") == 1

    (shards / "audit.json").write_text(json.dumps(stored | {"verdict": "fail", "short": ["container 1.00"]}))
    # The key may change in a continued run: it changes no result.
    fails = run(train)
    assert fails.returncode == 2 and "is a fail: container 1.00" in fails.stderr.splitlines()[-1]
    warned = run([*train[:-1], "false"])
    assert warned.returncode == 0 and "audit: fail: container 1.00" in warned.stdout


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes(audit, shards, tmp_path):
    for name in ("a", "b"):
        done = audit("--shards", shards, "--split", "train", "--output", tmp_path / f"{name}.json", *WORDS)
        assert done.returncode == 0, done.stderr
        assert not done.stderr.strip(), done.stderr
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["splits"] == ["train"]
    assert not (shards / "audit.json").exists()


def test_mistakes_are_one_line_and_code_2(audit, tiny_shards, tmp_path):
    source = tmp_path / "empty"
    source.mkdir()
    for words, message in (
        ((), "--layout: missing"),
        (("--layout", "cifake", "--source", source), "--output: missing"),
        (("--layout", "cifake", "--source", source, "--output", "a.json"), "no images of the cifake layout"),
        (("--shards", tiny_shards, "--layout", "cifake"), "--layout: has no use with --shards"),
        (("--shards", tmp_path / "nowhere"), "no such folder of shards"),
        (("--shards", tiny_shards, "--split", "dev"), "--split dev: expected some of"),
        (("--shards", tiny_shards, "--output", source), "is a folder"),
    ):
        done = audit(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ") and message in line, line
    assert list(tmp_path.iterdir()) == [source] and not (tiny_shards / "audit.json").exists()


def test_the_audit_needs_neither_torch_nor_dali(run, repo_root):
    code = "import sys, engines.audit.audit; print([m for m in ('torch', 'nvidia.dali') if m in sys.modules])"
    done = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(repo_root)!r}); {code}"])
    assert done.stdout == "[]\n", done.stderr
