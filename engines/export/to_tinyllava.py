"""Export a finetuned TinyLLaVA with the names of the published checkpoint."""

from pathlib import Path

from dataio.core.errors import UserError, as_user_error, writing
from models.tinyllava.checkpoint import write_published


def export_tinyllava(checkpoint: str | Path, output: str | Path) -> list[Path]:
    """Write the model of the folder `checkpoint` into the folder `output`.

    Returns:
        the files that were written.

    Raises:
        UserError: not a model, or a folder that cannot be written.
    """
    if Path(checkpoint).resolve() == Path(output).resolve():
        raise UserError("is the model itself; choose another folder", field="output", value=output)
    with as_user_error("--checkpoint "), writing(output, field="output"):
        return [Path(file) for file in write_published(checkpoint, output)]
