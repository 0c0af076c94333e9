"""Export a detector as two files: model.safetensors and config.json."""

import json
from pathlib import Path

from safetensors.torch import save_file

from dataio.core.atomic import sync_folder, write_text, write_with
from dataio.core.errors import UserError, writing
from engines.checkpoint.export_format import (
    EXPORT_CALIBRATION,
    EXPORT_SETTINGS,
    EXPORT_TENSORS,
    describe_export,
)
from engines.checkpoint.load_model import load_model


def export_checkpoint(checkpoint: str | Path, output: str | Path) -> Path:
    """Write a checkpoint's evaluated weights and all that other programs need to use them.

    Args:
        checkpoint: best.pt, a file of RUN/checkpoints, or final.safetensors.
        output: folder, created if missing; an earlier export in it is replaced.

    Returns:
        the folder.

    Raises:
        UserError: not a checkpoint; the folder holds something else or cannot be written.
    """
    from engines.evaluate.calibration import load_calibration, save_calibration

    model, config, info = load_model(checkpoint)
    calibration = load_calibration(checkpoint, model.state_dict())
    folder = Path(output)
    ours = (EXPORT_TENSORS, EXPORT_SETTINGS, EXPORT_CALIBRATION)
    if folder.is_dir() and any(p.name not in ours for p in folder.iterdir()):
        raise UserError("holds something else; choose an empty or new folder", field="output", value=folder)
    described = describe_export(config, info)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with writing(folder, field="output"):
        folder.mkdir(parents=True, exist_ok=True)
        # The settings are last: they mark the export as complete.
        for name in (EXPORT_SETTINGS, EXPORT_CALIBRATION):
            (folder / name).unlink(missing_ok=True)
        write_with(folder / EXPORT_TENSORS, lambda temporary: save_file(tensors, temporary))
        if calibration is not None:
            save_calibration(folder, calibration)
        write_text(folder / EXPORT_SETTINGS, json.dumps(described, indent=2) + "\n")
        sync_folder(folder)
    return folder
