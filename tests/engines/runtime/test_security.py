"""Checkpoints and weights are data, never code; secrets stay out of what a run writes."""

import ast
import os
import subprocess
import sys

import pytest
import torch

from engines.predict.explain import Explanation, as_html
from models.detector.weights import WeightsError, read_state
from tests.support import environment, flags

FORBIDDEN = {
    ("os", "system"),
    ("os", "popen"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("joblib", "load"),
}
FOLDERS = ("dataio", "engines", "launch", "models")


def calls(root):
    """(file, call) of every call in the code that is shipped."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(root)}:{node.lineno}", node


def named(node):
    """("torch", "load") of a call torch.load(...)."""
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.value.id, function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def constant(node, keyword):
    return next(
        (k.value.value for k in node.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)), None
    )


def test_no_call_runs_a_shell_or_unpickles(repo_root):
    found = list(calls(repo_root))
    loads = [node for _, node in found if named(node) == ("torch", "load")]
    assert len(found) > 1000 and len(loads) >= 2  # the search sees something
    assert all(constant(node, "weights_only") is True for node in loads)
    for where, node in found:
        assert named(node) not in FORBIDDEN, where
        assert named(node)[1] not in ("eval", "exec") or named(node)[0], where
        assert constant(node, "shell") is not True, where
        if named(node) in (("np", "load"), ("numpy", "load")):
            assert constant(node, "allow_pickle") is not True, where


def test_code_in_initial_weights_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    torch.save({"conv1.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_state(str(tmp_path / "weights.pth"), "resnet18")
    assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)  # it would have been
    assert (tmp_path / "pwned").exists()


def test_the_key_of_weights_and_biases_is_in_nothing_that_a_run_writes(tiny_shards, repo_root, run_folder):
    key = "0123456789abcdef" * 2 + "cafe5ec7"
    words = flags(
        data__shards=tiny_shards,
        run__dir=run_folder,
        train__steps=1,
        log__wandb="auto",
        model__backbone="cifarnet_narrow",
        model__stem="imagenet",
    )
    done = subprocess.run(
        [sys.executable, str(repo_root / "launch" / "train.py"), *words],
        # The mode in the environment is obeyed, though there is a key.
        env={**environment(), "WANDB_API_KEY": key, "WANDB_MODE": "offline"},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = [path for path in run_folder.rglob("*") if path.is_file()]
    assert any("offline-run" in str(path) for path in written) and len(written) > 6
    assert [str(path) for path in written if key.encode() in path.read_bytes()] == []
    assert key.encode() not in done.stdout + done.stderr


def test_text_on_the_explainers_page_is_escaped():
    evil = "<script>alert(1)</script>"
    said = Explanation(
        path=evil, verdict="Fake", p_fake=0.9, generator=evil, p_generator=0.9, explanation=evil
    )
    refused = Explanation(path=evil, error=evil)
    page = as_html([said, refused], checkpoint=evil, model=evil, tell=False)
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 5


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "run"
