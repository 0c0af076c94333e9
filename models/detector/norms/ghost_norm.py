"""Ghost batch norm for a whole network: replacing its norms, and the number of ghost batches."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from models.detector.norms.fused_blocks import use_fused_blocks
from models.detector.norms.ghost_modules import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostNorm,
)

_GHOST_FORMS: dict[type[nn.Module], type[GhostNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def use_ghost_norms(model: nn.Module) -> list[str]:
    """Turn every batch norm into its ghost form, and ResNet's and cifarnet's blocks into fused ones.

    Only classes change: parameters, buffers, their names and the outputs stay as they were. Harmless
    when called again.

    Args:
        model: changed in place.

    Returns:
        the names of modules that depend on the whole batch and have no ghost form; with any, a
        pass must hold one ghost batch. These are SyncBatchNorm, batch norms of other libraries,
        those with momentum None, and other modules with running statistics.
    """
    refused = [name for name, module in model.named_modules() if not _replaced(module)]
    use_fused_blocks(model)
    return refused


def set_ghosts(model: nn.Module, ghosts: int) -> None:
    """Let the coming passes in training mode hold `ghosts` ghost batches, equal parts along N.

    Args:
        model: after `use_ghost_norms`.

    Raises:
        ValueError: fewer than one.
    """
    if ghosts < 1:
        raise ValueError(f"ghosts is {ghosts}, expected 1 or more")
    for module in model.modules():
        if isinstance(module, GhostNorm):
            module.ghosts = ghosts


def _replaced(module: nn.Module) -> bool:
    """Whether the module is or now has a ghost form, or needs none."""
    if isinstance(module, GhostNorm):
        return True
    if not isinstance(module, _BatchNorm):
        buffers = dict(module.named_buffers(recurse=False))
        frozen = isinstance(module, FrozenBatchNorm2d) or type(module).__name__ == "FrozenBatchNormAct2d"
        return frozen or not {"running_mean", "running_var"} & buffers.keys()
    form = _GHOST_FORMS.get(type(module))
    if type(module).__module__ == "timm.layers.norm_act":
        from timm.layers.norm_act import BatchNormAct2d

        from models.detector.norms.timm_norms import GhostBatchNormAct2d

        form = GhostBatchNormAct2d if type(module) is BatchNormAct2d else None
    if form is None or module.momentum is None:
        return False
    module.__class__ = form
    return True
