"""Between pixels and the network's normalized images."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W]: (pixel / 255 - mean) / std."""
    means, stds = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - means) / stds


def to_pixels(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Undo `normalize`: float [N, 3, H, W] to uint8 [N, H, W, 3] on the CPU."""
    image = image.float()  # half precision would move gray levels
    means, stds = (image.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    pixels = (image * stds + means).mul(255).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
