"""Whether a map shows what an answer hangs on: deletion and insertion.

Petsiuk, Das & Saenko, "RISE" (BMVC 2018): pixels are taken away from an image in the order
of the map, the strongest first, and the probability of the explained class is followed: it
falls soon if the map is right, so that the area under it is small. Or they are put back
into a blurred image, and the area is large. Areas mean something only beside those of a
random map on the same images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import bootstrap, wilcoxon
from sklearn.metrics import auc

# Variants of the N images, float [N, 3, H, W], to the probability of each image's own class, [N].
Probability = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Areas:
    """The areas of N images.

    Attributes:
        share: float64 [S + 1], the shares of pixels taken away or put in, from 0 to 1.
        deletion, insertion: float64 [N, S + 1], probabilities of the class at these shares.
    """

    share: NDArray[np.float64]
    deletion: NDArray[np.float64]
    insertion: NDArray[np.float64]

    @property
    def deletion_auc(self) -> NDArray[np.float64]:
        """Float64 [N] in [0, 1], less is better."""
        return np.array([auc(self.share, curve) for curve in self.deletion])

    @property
    def insertion_auc(self) -> NDArray[np.float64]:
        """Float64 [N] in [0, 1], more is better."""
        return np.array([auc(self.share, curve) for curve in self.insertion])


def areas(
    probability: Probability, images: torch.Tensor, heat: NDArray[np.float32], *, steps: int, seed: int
) -> Areas:
    """Follow the class's probability while pixels go and come in the order of the maps.

    Deleted pixels become the image's mean colour, insertion starts from the blurred image,
    as in the paper, whose flat canvas is black.

    Args:
        images: float [N, 3, H, W], normalised. heat: float32 [N, H, W].
        steps: how many times pixels are changed. seed: of the order of equally hot pixels;
            in the order of their positions, a map of zeros would mean "from the top".

    Raises:
        ValueError: shapes that do not fit, or less than one step.
    """
    count, _, height, width = images.shape
    if heat.shape != (count, height, width) or not 1 <= steps <= height * width:
        raise ValueError(f"maps of shape {list(heat.shape)}, {steps} steps for images {list(images.shape)}")
    rank = torch.from_numpy(_ranks(heat, seed))[:, None]
    share = np.linspace(0, 1, steps + 1)
    mean, blurred = images.mean((2, 3), keepdim=True), _blurred(images)
    curves: tuple[list[Any], list[Any]] = ([], [])
    for part in share:
        hot = rank < round(part * height * width)
        for curve, variant in zip(
            curves, (torch.where(hot, mean, images), torch.where(hot, images, blurred)), strict=True
        ):
            curve.append(probability(variant).double().cpu().numpy())
    deletion, insertion = (np.stack(curve, axis=1) for curve in curves)
    return Areas(share, deletion, insertion)


def random_maps(count: int, cells: tuple[int, int], size: tuple[int, int], seed: int) -> NDArray[np.float32]:
    """Random maps as coarse as those they are compared with: float32 [count, H, W].

    A map of random pixels would be no fair rival: single pixels of grey are a trace
    themselves, to which a detector of traces answers at once.

    Args:
        cells: height and width of the grid of random numbers. size: H, W.
    """
    grid = np.random.default_rng(seed).random((count, 1, *cells), np.float32)
    return F.interpolate(torch.from_numpy(grid), size=size, mode="bilinear", align_corners=False)[
        :, 0
    ].numpy()


def compare_with_random(
    probability: Probability,
    images: torch.Tensor,
    heat: NDArray[np.float32],
    *,
    cells: tuple[int, int],
    steps: int = 16,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Mean areas of the maps and of random maps on the same images, as plain values.

    Args:
        images, heat: see `areas`. cells: see `random_maps`, the size of the maps before
            they were enlarged.
        resamples: of the images, for the interval.

    Returns:
        images, steps, and for deletion and insertion: the means `map` and `random`, their
        `difference` (map - random), its 95 % `interval` (percentile bootstrap over images,
        paired) and `p_value` (Wilcoxon's signed-rank test); null where there are too few
        images, with a `reason`.
    """
    count, _, height, width = images.shape
    if not count:
        return {"images": 0, "steps": steps, "deletion": None, "insertion": None, "reason": "no images"}
    rivals = random_maps(count, cells, (height, width), seed)
    map_areas = areas(probability, images, heat, steps=steps, seed=seed)
    random = areas(probability, images, rivals, steps=steps, seed=seed)
    comparison: dict[str, Any] = {"images": count, "steps": steps}
    for name in ("deletion", "insertion"):
        ours, theirs = getattr(map_areas, f"{name}_auc"), getattr(random, f"{name}_auc")
        comparison[name] = {"map": float(ours.mean()), "random": float(theirs.mean())}
        comparison[name] |= _paired(ours - theirs, seed, resamples)
    if count < 2:
        comparison["reason"] = "an interval takes at least two images"
    return comparison


def _paired(difference: NDArray[np.float64], seed: int, resamples: int) -> dict[str, Any]:
    """Mean, interval and p-value of paired differences, float64 [N]."""
    statistics: dict[str, Any] = {"difference": float(difference.mean()), "interval": None, "p_value": None}
    if len(difference) < 2:
        return statistics
    drawn = bootstrap(
        (difference,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
    )
    statistics["interval"] = [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]
    # Without any difference the test has nothing to rank.
    statistics["p_value"] = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return statistics


def _ranks(heat: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
    """The place of each pixel in its map's order, 0 the hottest: int64 [N, H, W]."""
    flat = heat.reshape(len(heat), -1)
    lots = np.random.default_rng(seed).random(flat.shape)
    order = np.lexsort((lots, -flat), axis=1)
    return np.argsort(order, axis=1).reshape(heat.shape)


def _blurred(images: torch.Tensor) -> torch.Tensor:
    """Blurred until nothing is told by it: by 5 px of 224 as in the paper, at least by 2 px."""
    height, width = images.shape[2:]
    sigma = max(2.0, 5 / 224 * math.sqrt(height * width))
    done = gaussian_filter(images.cpu().numpy(), (0, 0, sigma, sigma), mode="nearest")
    return torch.from_numpy(done).to(images)
