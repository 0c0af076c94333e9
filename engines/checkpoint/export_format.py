"""The form of an export: a folder with model.safetensors and config.json, for other programs."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dataio.core.errors import UserError, one_line
from dataio.core.versioned_json import parse_versioned_json
from engines.config.detector import Config
from engines.config.values import to_dict

EXPORT_TENSORS, EXPORT_SETTINGS = "model.safetensors", "config.json"
EXPORT_CALIBRATION = "model.calibration.json"
FORMAT = "telltale-export"
VERSION = 1
# What a program needs to repeat telltale's evaluation of one image, out of data.*.
PREPROCESSING = ("size", "eval_crop", "mean", "std")


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
        "preprocessing": {key: settings["data"][key] for key in PREPROCESSING},
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
    hint = f"expected a folder written by telltale export, or a checkpoint file such as {folder / 'best.pt'}"
    if not (folder / EXPORT_SETTINGS).is_file():
        raise UserError(f"{folder}: not an export (it has no {EXPORT_SETTINGS}); {hint}")
    try:
        described = parse_versioned_json(folder / EXPORT_SETTINGS, FORMAT, (VERSION,))
        state = {key: described[key] for key in ("codec", "layout", "step", "config")}
        state["labels"] = {key: described[key] for key in ("generators", "objects")}
        return {**state, "model": load_file(folder / EXPORT_TENSORS)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: not an export ({one_line(error)[:200]}); {hint}") from None
