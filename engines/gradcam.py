"""Where a detector looks: Grad-CAM of P(fake), by pytorch-grad-cam."""

from typing import Any

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import nn

from dataio.errors import UserError
from models.dual_head import DualHead


class _GeneratorLogits(nn.Module):
    """The generator head alone: Grad-CAM wants one output."""

    def __init__(self, model: DualHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image)[0]


class _Verdict:
    """log P(fake) - log P(real) of one image's generator logits, or its negative."""

    def __init__(self, fake: bool) -> None:
        self._sign = 1.0 if fake else -1.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        # Where the head is one vector, pytorch-grad-cam hands over single rows.
        return self._sign * (logits[..., 1:].logsumexp(-1) - logits[..., 0])


def last_convolution(model: DualHead) -> nn.Module:
    """The deepest layer whose output is still a map of more than one pixel: the last convolution.

    Raises:
        UserError: the backbone has none (a transformer).
    """
    found = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    if len(found) < 2:
        raise UserError("Grad-CAM needs a convolutional backbone, this detector's has none; use --no-cam")
    return found[-1]


def grad_cam(model: DualHead, image: torch.Tensor, *, fake: bool) -> np.ndarray:
    """How much each place speaks for the verdict: float32 [H, W] in [0, 1].

    Selvaraju et al., "Grad-CAM" (2017), of log P(fake) / P(real) (or its negative) at the
    last convolution.

    Args:
        model: in evaluation mode. image: float [1, 3, H, W], normalised.
    """
    wrapped = _GeneratorLogits(model)
    with GradCAM(model=wrapped, target_layers=[last_convolution(model)]) as cam:
        targets: list[Any] = [_Verdict(fake)]
        return np.asarray(cam(input_tensor=image, targets=targets)[0], np.float32)


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The heat over the picture, uint8 [H, W, 3].

    Args:
        picture: uint8 [H, W, 3]. heat: float32 [H, W] in [0, 1].
    """
    return show_cam_on_image(picture.astype(np.float32) / 255, heat, use_rgb=True)
