"""Export a detector as one ONNX file, kept only if ONNX Runtime's logits agree with PyTorch's."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from dataio.core.atomic import sync_folder, write_text, write_with
from dataio.core.errors import UserError, one_line, writing
from engines.checkpoint.export_format import EXPORT_CALIBRATION, EXPORT_SETTINGS, describe_export

GRAPH = "model.onnx"
TOLERANCE = 1e-3  # of the logits, see `largest_difference`


def export_onnx(checkpoint: str | Path, output: str | Path) -> tuple[Path, float]:
    """Write model.onnx, config.json and, where there is one, model.calibration.json.

    The graph takes `image`, float32 [N, 3, S, S], normalized, for any N, and returns the logits
    `generator` [N, G] and `object` [N, O].

    Args:
        checkpoint: RUN, best.pt, or another that `load_model` reads. output: folder, created
            if missing; an earlier export in it is replaced.

    Returns:
        the folder, and `largest_difference`, which is at most TOLERANCE.

    Raises:
        UserError: the packages are missing, the network cannot be exported or differs; the
            folder holds something else or cannot be written.
    """
    _check_packages()
    from engines.checkpoint.load_model import load_model
    from engines.evaluate.calibration import load_calibration, save_calibration

    model, config, info = load_model(checkpoint)
    calibration = load_calibration(checkpoint, model.state_dict())
    folder = Path(output)
    if folder.is_dir() and any(
        p.name not in (GRAPH, EXPORT_SETTINGS, EXPORT_CALIBRATION) for p in folder.iterdir()
    ):
        raise UserError("holds something else; choose an empty or new folder", field="output", value=folder)
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        _convert(model, config.data.size, temporary)
        difference = largest_difference(model, config.data.size, temporary)
        if not difference <= TOLERANCE:
            raise _cannot(
                f"ONNX Runtime's logits differ from PyTorch's by {difference:.2g}, expected at most "
                f"{TOLERANCE:g}; use the format detector"
            )

    description = {
        **describe_export(config, info),
        "onnx": {"input": "image", "outputs": ["generator", "object"]},
    }
    with writing(folder, field="output"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (EXPORT_SETTINGS, EXPORT_CALIBRATION):
            (folder / name).unlink(missing_ok=True)
        write_with(folder / GRAPH, write)
        if calibration is not None:
            save_calibration(folder, calibration)
        write_text(folder / EXPORT_SETTINGS, json.dumps(description, indent=2) + "\n")
        sync_folder(folder)
    return folder, difference


def _cannot(message: str) -> UserError:
    return UserError(message, field="format", value="onnx")


def _check_packages() -> None:
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise _cannot(
            f"needs the packages {', '.join(missing)}; install them with "
            "`pip install onnx onnxscript onnxruntime`"
        )


def _convert(model: torch.nn.Module, size: int, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # Two images: the exporter would treat a batch of one as a constant.
    example = torch.zeros(2, 3, size, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                input_names=["image"],
                output_names=["generator", "object"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _cannot(f"this network cannot be exported ({one_line(error)[:200]})") from None


def largest_difference(model: torch.nn.Module, size: int, path: Path) -> float:
    """The largest difference between ONNX Runtime's and PyTorch's logits on 1 and 5 random images.

    It is relative to the largest logit, or absolute if that is below 1. Probabilities near 0
    or 1 would hide differences.
    """
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 5):
        image = torch.randn(count, 3, size, size, generator=generator)
        with torch.inference_mode():
            expected = model(image)
        for logits, exported in zip(expected, session.run(None, {"image": image.numpy()}), strict=True):
            difference = float((torch.from_numpy(exported) - logits).abs().max())
            worst = max(worst, difference / max(1.0, float(logits.abs().max())))
    return worst
