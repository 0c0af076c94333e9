"""Boxes around the places of a heat map that stand out."""

import numpy as np
import pytest

from engines.attribution.regions import Region, find_regions


def test_parts_are_boxes_in_the_order_of_their_heat():
    heat = np.zeros((8, 10), np.float32)
    heat[1:3, 2:5] = 0.6
    heat[3, 5] = 1  # touches the first at a corner
    heat[6, 8:10] = 0.5
    heat[0, 9] = 0.4  # below half the maximum
    first, second = find_regions(heat)
    assert first == Region(2, 1, 6, 4, first.share, 1.0)
    assert second == Region(8, 6, 10, 7, second.share, 0.5)
    assert [first.share, second.share] == pytest.approx([4.6 / 6, 1 / 6])
    assert find_regions(heat, limit=1) == (first,)
    assert len(find_regions(heat, threshold=0.3)) == 3


def test_a_map_of_zeros_has_none():
    assert find_regions(np.zeros((4, 4), np.float32)) == ()
