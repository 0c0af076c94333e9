"""Exports: what is in them, that they load back bit for bit, and what they refuse."""

import json

import pytest
import torch

from dataio.core.errors import UserError
from engines.checkpoint import files as checkpoints
from engines.checkpoint.export_format import read_export
from engines.checkpoint.load_model import load_model
from engines.config.detector import from_dict
from engines.export.to_safetensors import export_checkpoint
from models.detector.dual_head import DualHead


@pytest.fixture
def checkpoint(tmp_path):
    config = {
        "model": {"backbone": "cifarnet_narrow", "head_hidden": 8, "object_hidden": 4},
        "data": {"size": 32},
    }
    torch.manual_seed(1)
    model, average = (
        DualHead(from_dict(config).model, ["nature", "adm"], ["cat", "dog", "frog"]) for _ in range(2)
    )
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 7,
        "model": checkpoints.cpu_state(model),
        "ema": checkpoints.cpu_state(average),
        "labels": {"generators": ["nature", "adm"], "objects": ["cat", "dog", "frog"]},
        "codec": {"preset": "keep"},
        "layout": "cifake",
        "config": config,
    }
    checkpoints.save(tmp_path / "best.pt", state)
    return tmp_path / "best.pt", average.eval()


def test_an_export_loads_back_bit_for_bit_and_is_what_would_be_judged(checkpoint, tmp_path):
    path, average = checkpoint
    export_checkpoint(path, tmp_path / "out")
    loaded, config, info = load_model(tmp_path / "out")
    image = torch.randn(3, 3, 32, 32)
    for found, expected in zip(loaded(image), average(image), strict=True):
        assert torch.equal(found, expected)
    assert config.model.object_hidden == 4 and info["step"] == 7 and info["layout"] == "cifake"
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["generators"] == ["nature", "adm"] and described["preprocessing"]["size"] == 32
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    export_checkpoint(path, tmp_path / "out")  # again, over itself
    export_checkpoint(tmp_path / "out", tmp_path / "copy")
    assert before == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert before == (tmp_path / "copy" / "model.safetensors").read_bytes()


def test_a_folder_that_holds_something_else_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine: holds something else"):
        export_checkpoint(checkpoint[0], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["no settings", "no tensors", "version", "half"])
def test_incomplete_exports_are_refused(checkpoint, tmp_path, damage):
    folder = export_checkpoint(checkpoint[0], tmp_path / "out")
    settings, tensors = folder / "config.json", folder / "model.safetensors"
    if damage == "no settings":
        settings.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "version":
        settings.write_text(settings.read_text().replace('"version": 1', '"version": 9', 1))
    else:
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    with pytest.raises(UserError, match="out: not an export") as caught:
        read_export(folder)
    assert "\n" not in str(caught.value)
