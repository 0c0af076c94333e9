"""ONNX exports: that they say what PyTorch says, for any number of images, or are not there."""

import json

import numpy as np
import pytest
import torch

from dataio.core.errors import UserError
from engines.checkpoint.load_model import load_model
from engines.export.to_onnx import export_onnx, largest_difference
from tests.support import write_detector


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(write_detector(tmp_path / "best.pt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx_runtime_says_what_pytorch_says(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e .[onnx]")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install -e .[onnx]")
    checkpoint = write_detector(tmp_path / "best.pt")
    folder, difference = export_onnx(checkpoint, tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.onnx"]
    assert difference < 1e-4
    model, _, _ = load_model(checkpoint)
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    image = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)
    for found, logits in zip(
        session.run(["generator", "object"], {"image": image.numpy()}), expected, strict=True
    ):
        np.testing.assert_allclose(found, logits.numpy(), atol=1e-3)
    described = json.loads((folder / "config.json").read_text())
    assert described["onnx"]["input"] == "image" and described["preprocessing"]["size"] == 32
    # The check sees a difference where there is one.
    assert isinstance(model.generator_head, torch.nn.Linear)
    with torch.no_grad():
        model.generator_head.bias[0] += 1
    assert largest_difference(model, 32, folder / "model.onnx") > 0.05
