"""Whether initial weights lie where a compute node finds them, which may have no network."""

from pathlib import Path

from dataio.core.errors import UserError, as_user_error
from engines.checkpoint.files import CheckpointFolder
from engines.config.detector import Config
from models.detector.backbones.timm_nets import TIMM
from models.detector.weights import fetch_command, find_weights


def weights_files(config: Config) -> dict[str, Path]:
    """The file of `model.weights` by that key; {} where none is needed, or where timm's own hub knows.

    Raises:
        UserError: it is not on this machine, and the run is not a continuation; the message has the
            command that fetches it.
    """
    source, backbone = config.model.weights, config.model.backbone
    begun = CheckpointFolder(Path(config.run.dir) / "checkpoints", config.checkpoint.keep).steps()
    if not source or (backbone.startswith(TIMM) and source == "pretrained"):
        return {}
    try:
        with as_user_error():
            file = find_weights(source, backbone)
        if file is None:
            raise UserError(
                f"model.weights {source}: not on this machine, and a compute node may have no network; fetch it "
                f"once, here: {fetch_command(source, backbone)} (or start from scratch: --model.weights '')"
            )
    except UserError:
        if begun:  # by its own checkpoint; the run itself says what else it needs
            return {}
        raise
    return {"model.weights": file}
