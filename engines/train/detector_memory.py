"""The memory that training a detector takes on each GPU, estimated from the network alone."""

from dataclasses import dataclass

import torch

from engines.config.detector import Config
from models.detector.dual_head import DualHead

_PROBED = 2  # images; batch norm refuses one where its map is of one pixel


@dataclass(frozen=True)
class DetectorMemory:
    """Bytes on each GPU.

    Attributes:
        state: weights, gradients, the optimizer's moments, averaged weights and half-precision copies.
        image: what the forward pass keeps for the backward pass, for each image of a pass.
    """

    state: int
    image: int

    def of_pass(self, images: int) -> int:
        """Bytes at the peak of a pass, without cuDNN's and NCCL's workspaces and DALI's buffers."""
        return self.state + images * self.image


def estimate_detector_memory(model: DualHead, config: Config, precision: str) -> DetectorMemory:
    """Counts parameters, and the tensors that autograd keeps of a forward pass on the CPU.

    fp32 elements count half in half precision, as autocast has them; fused norms on a GPU keep somewhat
    less than is counted here.

    Args:
        model: on the CPU; its running statistics change. precision: fp32, bf16 or fp16.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    moments = {"sgd": int(config.optim.momentum > 0), "adamw": 2}[config.optim.name]
    half = precision != "fp32"
    state = parameters * (4 * (2 + moments + bool(config.train.ema)) + 2 * half)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    frozen = config.train.frozen_epochs == -1
    model.freeze_backbone(frozen)
    model.train()
    if frozen:
        model.backbone.eval()
    images = torch.zeros(_PROBED, 3, config.data.size, config.data.size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    sizes = [
        tensor.untyped_storage().nbytes() // (2 if half and tensor.is_floating_point() else 1)
        for tensor in kept.values()
    ]
    pixels = images.nbytes // (2 if half else 1)  # kept by the first convolution where that learns
    return DetectorMemory(state, (sum(sizes) + (pixels if frozen else 0)) // _PROBED)
