"""MixUp and CutMix on both heads, as pure functions of (seed, step, micro-batch).

A micro-batch is mixed with itself rolled by one place: the order is random already, so the
pairs are too. One share per micro-batch; both heads see the same mixture of labels. Nothing
is drawn from a generator with state, so a resumed run mixes as the undisturbed one, on any
number of processes.
"""

import numpy as np
import torch

from dataio.core.counter_rng import PURPOSE_MIX, uniform
from engines.config.detector import MixConfig


def mix(
    config: MixConfig, image: torch.Tensor, *, seed: int, step: int, micro_batch: int
) -> tuple[torch.Tensor, float]:
    """Mix every image of a micro-batch with the one before it.

    Args:
        image: float [N, C, H, W]; not changed.
        seed: the run's. step: from 0. micro_batch: its number in the step, over all ranks.

    Returns:
        images of the same shape, and the share of each image's own label in [0.5, 1]; the
        rest is the label of the image before it (`labels.roll(1)`).
    """
    place = np.array([micro_batch])
    chance, which, share, at_x, at_y = (
        float(uniform(seed, step, PURPOSE_MIX, place, draw)[0]) for draw in range(5)
    )
    if config.mixup == config.cutmix == 0 or chance >= config.probability or len(image) < 2:
        return image, 1.0
    cut = config.mixup == 0 or (config.cutmix > 0 and which < 0.5)
    alpha = config.cutmix if cut else config.mixup
    from scipy.stats import beta  # most of a second to import, for the runs that mix

    own_share = float(beta.ppf(share, alpha, alpha))
    # The draw is symmetric. With the larger share as the image's own, its label stays the one to count errors by.
    own_share = max(own_share, 1 - own_share)
    if not cut:
        return torch.lerp(image.roll(1, 0), image, own_share), own_share
    height, width = image.shape[-2:]
    # A box of the other's share of the area, its center anywhere, cut at the border.
    half_y, half_x = ((1 - own_share) ** 0.5 * side / 2 for side in (height, width))
    top, bottom = _span(at_y * height, half_y, height)
    left, right = _span(at_x * width, half_x, width)
    mixed = image.clone()
    mixed[:, :, top:bottom, left:right] = image.roll(1, 0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(center: float, half: float, side: int) -> tuple[int, int]:
    return max(0, round(center - half)), min(side, round(center + half))
