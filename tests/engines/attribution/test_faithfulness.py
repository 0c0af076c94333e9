"""Deletion and insertion on detectors of which the right map is known."""

import numpy as np
import pytest
import torch

from engines.attribution.faithfulness import areas, compare_with_random, random_maps

SIZE = 16


@pytest.fixture
def images():
    """Twelve noisy images; noise, so that a blur takes the evidence away."""
    return torch.randn(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def corner(variants):
    """The probability is the contrast of the upper left quarter, and nothing else."""
    quarter = variants[:, :, : SIZE // 2, : SIZE // 2].flatten(1)
    return 1 - torch.exp(-quarter.var(1))


def true_map(count=12):
    heat = np.zeros((count, SIZE, SIZE), np.float32)
    heat[:, : SIZE // 2, : SIZE // 2] = 1
    return heat


def test_the_true_map_beats_random_ones_and_the_inverted_map_loses_to_them(images):
    good = compare_with_random(corner, images, true_map(), cells=(4, 4))
    bad = compare_with_random(corner, images, 1 - true_map(), cells=(4, 4))
    # Deletion: less is better; insertion: more.
    assert good["deletion"]["interval"][1] < 0 < bad["deletion"]["interval"][0]
    assert bad["insertion"]["interval"][1] < 0 < good["insertion"]["interval"][0]
    for found in (good, bad):
        assert found["images"] == 12 and found["steps"] == 16
        for one in (found["deletion"], found["insertion"]):
            assert one["difference"] == pytest.approx(one["map"] - one["random"])
            assert one["interval"][0] <= one["difference"] <= one["interval"][1]
            assert one["p_value"] < 0.01
    # Both are compared with the same random maps.
    assert good["deletion"]["random"] == bad["deletion"]["random"]


def test_the_curves_are_those_computed_by_hand(images):
    """The probability is the share of pixels left of the original: both curves are straight."""
    spread = torch.arange(SIZE * SIZE, dtype=torch.float32).reshape(1, 1, SIZE, SIZE).repeat(1, 3, 1, 1)

    def untouched(variants):
        return (variants == spread).all(1).float().mean((1, 2))

    heat = np.random.default_rng(1).random((1, SIZE, SIZE)).astype(np.float32)
    found = areas(untouched, spread, heat, steps=4, seed=0)
    np.testing.assert_allclose(found.share, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.deletion[0], [1, 0.75, 0.5, 0.25, 0], atol=0.01)
    np.testing.assert_allclose(found.insertion[0], [0, 0.25, 0.5, 0.75, 1], atol=0.01)
    assert found.deletion_auc[0] == pytest.approx(0.5, abs=0.01)
    assert found.insertion_auc[0] == pytest.approx(0.5, abs=0.01)


def test_the_hottest_pixels_go_first(images):
    seen = []
    heat = true_map(1)

    def look(variants):
        seen.append(variants.clone())
        return variants.new_zeros(1)

    areas(look, images[:1], heat, steps=4, seed=0)
    deleted, inserted = seen[2], seen[3]  # after the first quarter of the pixels
    hot = torch.from_numpy(heat[0] == 1)
    mean = images[0].mean((1, 2))
    assert torch.allclose(deleted[0][:, hot], mean[:, None]) and torch.equal(
        deleted[0][:, ~hot], images[0][:, ~hot]
    )
    assert torch.equal(inserted[0][:, hot], images[0][:, hot])
    assert not torch.isclose(inserted[0][:, ~hot], images[0][:, ~hot]).any(0).all()
    assert torch.equal(seen[0], images[:1]) and torch.equal(seen[-1], images[:1])


def test_equally_hot_pixels_go_in_no_order_of_position_but_always_in_the_same(images):
    nothing = np.zeros((12, SIZE, SIZE), np.float32)
    first, again, other = (areas(corner, images, nothing, steps=4, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.deletion, again.deletion) and not np.array_equal(
        first.deletion, other.deletion
    )
    # From the top, half of the pixels would hold the whole corner; in no order they leave half of it.
    assert (first.deletion[:, 2] > 0.1).all()


def test_random_maps_are_seeded_and_as_coarse_as_asked():
    maps = random_maps(2, (2, 2), (SIZE, SIZE), 3)
    assert maps.shape == (2, SIZE, SIZE) and maps.dtype == np.float32
    assert np.array_equal(maps, random_maps(2, (2, 2), (SIZE, SIZE), 3))
    assert not np.array_equal(maps, random_maps(2, (2, 2), (SIZE, SIZE), 4))
    assert not np.array_equal(maps[0], maps[1])
    assert len(np.unique(maps[0][: SIZE // 4, : SIZE // 4])) == 1  # within one cell's outer part


def test_one_image_has_no_interval_none_has_nothing_and_equal_answers_no_difference(images):
    one = compare_with_random(corner, images[:1], true_map(1), cells=(4, 4), steps=4)
    assert one["deletion"]["interval"] is None and one["deletion"]["p_value"] is None
    assert "two images" in one["reason"] and one["deletion"]["difference"] < 0
    none = compare_with_random(corner, images[:0], true_map(0), cells=(4, 4))
    assert none["images"] == 0 and none["deletion"] is None and none["reason"] == "no images"
    flat = compare_with_random(
        lambda v: v.new_full((len(v),), 0.5), images, true_map(), cells=(4, 4), steps=4
    )
    assert flat["insertion"] == {
        "map": 0.5,
        "random": 0.5,
        "difference": 0.0,
        "interval": [0.0, 0.0],
        "p_value": 1.0,
    }


def test_maps_that_do_not_fit_are_refused(images):
    for heat, steps in ((true_map(3), 4), (true_map(), 0), (true_map(), SIZE * SIZE + 1)):
        with pytest.raises(ValueError, match="steps for images"):
            areas(corner, images, heat, steps=steps, seed=0)
