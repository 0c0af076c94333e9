"""Exports of a detector for other programs.

`engines.checkpoint.export_format` describes the files and reads them back.

Public names:
    `to_safetensors.export_checkpoint`: model.safetensors and config.json.
    `to_onnx.export_onnx`: one ONNX file, checked against PyTorch.
"""
