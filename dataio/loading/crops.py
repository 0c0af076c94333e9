"""Crop boxes of training and evaluation, as pure functions of position and image size."""

import numpy as np
from numpy.typing import NDArray

from dataio.core.counter_rng import PURPOSE_CROP, uniforms


def train_boxes(
    crop: str,
    size: int,
    pad: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    seed: int,
    epoch: int,
    position: NDArray[np.int64],
    width: NDArray[np.int64],
    height: NDArray[np.int64],
    step: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Crop boxes and flips of training samples.

    Args:
        crop: "random" (a square of `size` px after padding by `pad`, never resampled where
            the image is large enough) or "random_resized" (area `scale`, aspect `ratio`;
            Szegedy et al., "Going deeper with convolutions", as in torchvision, but
            without its rejection loop: a box that does not fit is shrunk to fit).
        size, pad: pixels. scale: of the area. ratio: width / height. flip: probability.
        position: int64 [N], positions in the epoch; width, height: int64 [N], pixels.
        step: with "random", boxes begin at -pad, -pad + step and so on.

    Returns:
        boxes int32 [N, 4] as (y, x, height, width) in source pixels, y and x negative
        inside the padding; flips int32 [N], 0 or 1.
    """
    draw = uniforms(seed, epoch, PURPOSE_CROP, position, 3 if crop == "random" else 5)
    if crop == "random":
        box_w = np.minimum(size, width + 2 * pad)
        box_h = np.minimum(size, height + 2 * pad)
        slack_w, slack_h = width + 2 * pad - box_w, height + 2 * pad - box_h
    else:
        area = width * height * (scale[0] + draw[3] * (scale[1] - scale[0]))
        log_ratio = np.log(ratio[0]) + draw[4] * (np.log(ratio[1]) - np.log(ratio[0]))
        aspect = np.exp(log_ratio)
        box_w = np.clip(np.rint(np.sqrt(area * aspect)), 1, width).astype(np.int64)
        box_h = np.clip(np.rint(np.sqrt(area / aspect)), 1, height).astype(np.int64)
        slack_w, slack_h = width - box_w, height - box_h
        pad, step = 0, 1
    x = step * np.floor(draw[0] * (slack_w // step + 1)).astype(np.int64) - pad
    y = step * np.floor(draw[1] * (slack_h // step + 1)).astype(np.int64) - pad
    boxes = np.stack([y, x, box_h, box_w], axis=1).astype(np.int32)
    return boxes, (draw[2] < flip).astype(np.int32)


def center_boxes(
    fraction: float, width: NDArray[np.int64], height: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Evaluation's boxes: the centered square of side round(fraction * shortest side), no flip.

    Returns:
        boxes int32 [N, 4] as (y, x, height, width); flips int32 [N], all 0.
    """
    side = np.maximum(1, np.rint(fraction * np.minimum(width, height))).astype(np.int64)
    boxes = np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)
    return boxes.astype(np.int32), np.zeros(len(boxes), np.int32)
