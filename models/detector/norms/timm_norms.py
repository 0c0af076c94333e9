"""The ghost form of timm's batch norm with an activation; import it only where timm is installed."""

from typing import Any

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from models.detector.norms.ghost_modules import GhostBatchNorm2d


class GhostBatchNormAct2d(GhostBatchNorm2d, BatchNormAct2d):
    """BatchNormAct2d over ghost batches: its `drop` and `act` follow the norm and the residual."""

    def _activate(self, output: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            output = output + residual
        return self.act(self.drop(output))

    def _fused(self, input: Tensor, residual: Tensor | None, activation: str, *, split: bool = False) -> Any:
        act, idle = self.act, isinstance(self.drop, nn.Identity)
        if idle and isinstance(act, nn.Identity):
            return super()._fused(input, residual, "none")
        if idle and type(act) is nn.ReLU:
            return super()._fused(input, residual, "relu")
        if idle and type(act) is nn.GELU and act.approximate == "none":
            return super()._fused(input, residual, "gelu")
        return act(self.drop(super()._fused(input, residual, "none")))
