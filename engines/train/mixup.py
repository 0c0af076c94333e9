"""MixUp and CutMix on both heads, as pure functions of (seed, step, micro-batch).

A micro-batch is mixed with itself rolled by one place: the order is random already, so the
pairs are too. One share per micro-batch; both heads see the same mixture of labels. Nothing
is drawn from a generator with state, so a resumed run mixes as the undisturbed one, on any
number of processes and in passes of any size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dataio.core.counter_rng import PURPOSE_MIX, uniform
from engines.config.detector import MixConfig


@dataclass(frozen=True)
class MixDraws:
    """How each micro-batch of a pass is mixed.

    Attributes:
        blend: float32 [G], weight of each image's own pixels. box: int64 [G, 4], the rectangle
            (top, bottom, left, right) that shows the other image, pixels; empty for none.
        own_share: float32 [G], of each image's own label, in [0.5, 1] up to the rounding of boxes;
            the rest is the label of the image before it.
    """

    blend: NDArray[np.float32]
    box: NDArray[np.int64]
    own_share: NDArray[np.float32]


def draw_mix(
    config: MixConfig, *, height: int, width: int, seed: int, step: int, micro_batches: range
) -> MixDraws:
    """The mixing of each micro-batch, given by its number in the step, over all ranks.

    Args:
        height, width: of the images, pixels. seed: the run's. step: from 0.
    """
    place = np.arange(micro_batches.start, micro_batches.stop)
    chance, which, share, at_x, at_y = (uniform(seed, step, PURPOSE_MIX, place, draw) for draw in range(5))
    blend = np.ones(len(place))
    box = np.zeros((len(place), 4), np.int64)
    mixed = chance < config.probability
    if config.mixup == config.cutmix == 0 or not mixed.any():
        return MixDraws(blend.astype(np.float32), box, blend.astype(np.float32))
    from scipy.stats import beta  # most of a second to import, for the runs that mix

    cut = (config.mixup == 0) | ((config.cutmix > 0) & (which < 0.5))
    alpha = np.where(cut, config.cutmix, config.mixup)
    drawn = beta.ppf(share, alpha, alpha)
    # The draw is symmetric. With the larger share as the image's own, its label stays the one to count errors by.
    drawn = np.maximum(drawn, 1 - drawn)
    own_share = np.where(mixed, drawn, 1.0)
    # A box of the other's share of the area, its center anywhere, cut at the border.
    half_y, half_x = (np.sqrt(1 - drawn) * side / 2 for side in (height, width))
    spans = [*_span(at_y * height, half_y, height), *_span(at_x * width, half_x, width)]
    box = np.where((mixed & cut)[:, None], np.stack(spans, axis=1), 0)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    own_share = np.where(cut, 1 - area / (height * width), own_share)
    blend = np.where(cut, 1.0, own_share)
    return MixDraws(blend.astype(np.float32), box, own_share.astype(np.float32))


def _span(
    center: NDArray[np.float64], half: NDArray[np.float64], side: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, last = np.rint(center - half), np.rint(center + half)
    return np.maximum(0, first).astype(np.int64), np.minimum(side, last).astype(np.int64)


def image_before(count: int, micro_batches: int, device: torch.device) -> torch.Tensor:
    """The index of each image's partner: the one before it in its micro-batch, int64 [count]."""
    places = torch.arange(count, device=device).view(micro_batches, -1)
    return places.roll(1, 1).flatten()


def per_image(values: torch.Tensor, each: int) -> torch.Tensor:
    """Each micro-batch's value for each of its images: [G, ...] to [G * each, ...], without a copy to the host."""
    return values[:, None].expand(-1, each, *values.shape[1:]).reshape(-1, *values.shape[1:])


def apply_mix(
    image: torch.Tensor, before: torch.Tensor, blend: torch.Tensor, box: torch.Tensor
) -> torch.Tensor:
    """Mix every image of a pass with its partner, on the device.

    Args:
        image: float [N, C, H, W]; not changed. before: int64 [N], see `image_before`.
        blend, box: see `MixDraws`, as tensors.
    """
    height, width = image.shape[-2:]
    each = len(image) // len(blend)
    other = image[before]
    mixed = torch.lerp(other, image, per_image(blend.to(image.dtype), each)[:, None, None, None])
    top, bottom, left, right = per_image(box, each).T[:, :, None]
    y, x = (torch.arange(side, device=image.device) for side in (height, width))
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    pasted = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(pasted, other, mixed).contiguous(memory_format=torch.channels_last)
