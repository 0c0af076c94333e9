"""A detector as two files for other programs: model.safetensors and config.json."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dataio.core.atomic import sync_folder, write_text, write_with
from dataio.core.errors import UserError
from engines.config.detector import Config
from engines.config.values import to_dict

TENSORS, SETTINGS = "model.safetensors", "config.json"
CALIBRATION = "model.calibration.json"
FORMAT = "telltale-export"
VERSION = 1
# What a program needs to repeat telltale's evaluation of one image, out of data.*.
_PREPROCESSING = ("size", "eval_crop", "mean", "std")


def export_checkpoint(checkpoint: str | Path, output: str | Path) -> Path:
    """Write a checkpoint's evaluated weights and all that is needed to use them, calibration included.

    Args:
        checkpoint: best.pt, a file of RUN/checkpoints, or final.safetensors.
        output: folder, made where it is missing; an earlier export in it is replaced.

    Returns:
        the folder.

    Raises:
        UserError: not a checkpoint; the folder holds something else or cannot be written.
    """
    from engines.evaluate.calibration import load_calibration, save_calibration
    from engines.evaluate.split_inference import load_model

    model, config, info = load_model(checkpoint)
    calibration = load_calibration(checkpoint, model.state_dict())
    folder = Path(output)
    ours = (TENSORS, SETTINGS, CALIBRATION)
    if folder.is_dir() and any(p.name not in ours for p in folder.iterdir()):
        raise UserError(f"--output {folder}: holds something else; choose an empty or new folder")
    described = describe(config, info)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The settings last: a folder without them is no export.
        for name in (SETTINGS, CALIBRATION):
            (folder / name).unlink(missing_ok=True)
        write_with(folder / TENSORS, lambda temporary: save_file(tensors, temporary))
        if calibration is not None:
            save_calibration(folder, calibration)
        write_text(folder / SETTINGS, json.dumps(described, indent=2) + "\n")
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror or error}); choose another"
        ) from None
    return folder


def describe(config: Config, info: dict[str, Any]) -> dict[str, Any]:
    """What another program needs to know of a detector, and telltale to build it again.

    Args:
        info: as `engines.evaluate.split_inference.load_model` gives it.
    """
    settings = to_dict(config)
    return {
        "format": FORMAT,
        "version": VERSION,
        "generators": info["labels"]["generators"],
        "objects": info["labels"]["objects"],
        "preprocessing": {key: settings["data"][key] for key in _PREPROCESSING},
        "real_fake": "P(fake) = 1 - softmax(generator logits)[0]",
        "codec": info["codec"],
        "layout": info["layout"],
        "step": info["step"],
        "config": settings,
    }


def read_export(folder: str | Path) -> dict[str, Any]:
    """An export in the form of a checkpoint: model, labels, codec, layout, step, config.

    Raises:
        UserError: not a complete export, or one of another version.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / SETTINGS).read_text())
        if described.get("format") != FORMAT:
            raise ValueError(f"format is {described.get('format')!r}, expected {FORMAT!r}")
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']}, this telltale reads {VERSION}")
        state = {key: described[key] for key in ("codec", "layout", "step", "config")}
        state["labels"] = {key: described[key] for key in ("generators", "objects")}
        return {**state, "model": load_file(folder / TENSORS)}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: not an export ({reason}); expected a folder written by launch/export.py, "
            f"or a checkpoint file such as {folder / 'best.pt'}"
        ) from None
