"""The places of a heat map that stand out, as boxes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label


@dataclass(frozen=True)
class Region:
    """A connected part of a heat map above a threshold.

    Attributes:
        left, top, right, bottom: of its box, pixels of the map; right and bottom exclusive.
        share: of the map's whole heat that lies in the part, in (0, 1].
        peak: the largest heat in it.
    """

    left: int
    top: int
    right: int
    bottom: int
    share: float
    peak: float


def find_regions(heat: NDArray[np.float32], *, threshold: float = 0.5, limit: int = 5) -> tuple[Region, ...]:
    """The parts of a heat map that reach `threshold`, those with the most heat first.

    Pixels that touch at a side or a corner belong together.

    Args:
        heat: float [H, W], at least 0. threshold: as a fraction of the map's maximum.
        limit: the most regions returned.
    """
    total = float(heat.sum(dtype=np.float64))
    if total <= 0:
        return ()
    parts, _ = label(heat >= threshold * heat.max(), structure=np.ones((3, 3)))
    regions = []
    for number, (rows, columns) in enumerate(find_objects(parts), start=1):
        inside = heat[rows, columns][parts[rows, columns] == number]
        share = float(inside.sum(dtype=np.float64)) / total
        regions.append(Region(columns.start, rows.start, columns.stop, rows.stop, share, float(inside.max())))
    return tuple(sorted(regions, key=lambda region: -region.share)[:limit])
