"""The form of an export: a folder with model.safetensors and config.json, for other programs."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dataio.core.errors import UserError, one_line
from engines.config.detector import Config
from engines.config.values import to_dict

EXPORT_TENSORS, EXPORT_SETTINGS = "model.safetensors", "config.json"
EXPORT_CALIBRATION = "model.calibration.json"
FORMAT = "telltale-export"
VERSION = 1
# What a program needs to repeat telltale's evaluation of one image, out of data.*.
_PREPROCESSING = ("size", "eval_crop", "mean", "std")


def describe_export(config: Config, info: dict[str, Any]) -> dict[str, Any]:
    """What another program needs to know of a detector, and telltale to build it again.

    Args:
        info: as `engines.checkpoint.load_model.load_model` gives it.
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
        described = json.loads((folder / EXPORT_SETTINGS).read_text())
        if described.get("format") != FORMAT:
            raise ValueError(f"format is {described.get('format')!r}, expected {FORMAT!r}")
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']}, this telltale reads {VERSION}")
        state = {key: described[key] for key in ("codec", "layout", "step", "config")}
        state["labels"] = {key: described[key] for key in ("generators", "objects")}
        return {**state, "model": load_file(folder / EXPORT_TENSORS)}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: not an export ({one_line(error)[:200]}); expected a folder written by launch/export.py, "
            f"or a checkpoint file such as {folder / 'best.pt'}"
        ) from None
