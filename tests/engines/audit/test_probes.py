"""The probes: their intervals, their folds, and that chance looks like chance."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from engines.audit.features import CONTAINER_NAMES, PIXEL_NAMES
from engines.audit.probes import (
    Data,
    cannot_say,
    leaks,
    probe,
    probe_families,
    single_features,
)
from engines.audit.sample import shares
from engines.stats.bootstrap import auroc_over_groups


def pixels(count, seed, shift=0.0):
    """Normal features; the first radial power of fakes is shifted."""
    rng = np.random.default_rng(seed)
    features, fake = rng.normal(size=(count, len(PIXEL_NAMES))), np.arange(count) % 2 == 1
    features[fake, PIXEL_NAMES.index("power_03")] += shift
    return Data(features, fake, np.arange(count))


def containers(count, seed):
    rng = np.random.default_rng(seed)
    return Data(
        rng.integers(0, 3, (count, len(CONTAINER_NAMES))).astype(float),
        np.arange(count) % 2 == 1,
        np.arange(count),
    )


def test_the_interval_is_that_of_scikit_learns_weighted_auroc():
    rng = np.random.default_rng(5)
    fake, scores, group = rng.random(80) < 0.4, rng.integers(0, 9, 80) / 9.0, rng.integers(0, 30, 80)
    _, group = np.unique(group, return_inverse=True)
    draws, expected = np.random.Generator(np.random.PCG64(3)), []
    for _ in range(50):
        drawn = np.bincount(draws.integers(0, group.max() + 1, group.max() + 1), minlength=group.max() + 1)
        expected.append(roc_auc_score(fake, scores, sample_weight=drawn[group]))
    found = auroc_over_groups(fake, scores, group, resamples=50, seed=3)
    assert found == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # Scores of fakes are shifted by one deviation: the AUROC is Phi(1 / sqrt 2) = 0.7602.
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        fake = np.arange(120) % 2 == 1
        scores = rng.normal(size=120) + fake
        low, high = auroc_over_groups(fake, scores, np.arange(120), resamples=300, seed=seed)
        covered += low <= 0.7602 <= high
    assert 0.90 <= covered / 200 <= 0.985  # 95 % and four deviations of so few trials, rounded


def test_images_of_one_group_widen_the_interval_and_share_a_fold():
    # Each group has features of its own: whoever saw one of its images knows the others.
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(40), 6)
    features = rng.normal(size=(40, len(PIXEL_NAMES)))[group] + rng.normal(0, 0.01, (240, len(PIXEL_NAMES)))
    fake = group % 2 == 1
    torn = probe(Data(features, fake, np.arange(240)), "pixels", seed=0)
    whole = probe(Data(features, fake, group), "pixels", seed=0)
    assert torn["low"] > 0.95
    assert not leaks(whole, "pixels") and whole["groups"] == 40
    assert whole["high"] - whole["low"] > 2 * (torn["high"] - torn["low"])


@pytest.mark.parametrize(("draw", "kind"), [(containers, "container"), (pixels, "pixels")])
def test_chance_is_not_called_a_leak(draw, kind):
    found = [probe(draw(160, seed), kind, seed=seed) for seed in range(8)]
    assert not any(leaks(one, kind) for one in found)
    assert abs(np.mean([one["auroc"] for one in found]) - 0.5) < 0.05
    # One in twenty intervals may miss; of eight, three and more would be odd (p < 0.01).
    assert sum(not one["low"] <= 0.5 <= one["high"] for one in found) <= 2


def test_a_shift_is_found_named_and_the_same_every_time():
    data = pixels(300, 7, shift=1.5)
    found = probe(data, "pixels", seed=1)
    assert leaks(found, "pixels") and found == probe(data, "pixels", seed=1)
    assert set(found["models"]) == {"extra_trees", "logistic_regression"}
    families = probe_families(data, np.ones(300, bool), "pixels", seed=1)
    assert [name for name, one in families.items() if leaks(one, "pixels")] == ["radial spectrum"]
    best = single_features(data, "pixels")[0]
    alone = roc_auc_score(data.fake, data.features[:, PIXEL_NAMES.index("power_03")])
    assert best["feature"] == "power_03" and best["auroc"] == pytest.approx(alone, abs=1e-4)
    assert best["fake"] - best["real"] == pytest.approx(1.5, abs=0.4)


def test_what_only_jpeg_files_have_is_asked_of_jpeg_files_alone():
    rng = np.random.default_rng(0)
    count, fake = 200, np.arange(200) % 2 == 1
    features = np.full((count, len(CONTAINER_NAMES)), 1.0)
    column = CONTAINER_NAMES.index("subsampling")
    features[:, column] = rng.integers(0, 3, count)  # says nothing among JPEGs
    jpeg = ~fake | (np.arange(count) % 4 == 1)
    features[~jpeg, column] = np.nan
    data = Data(features, fake, np.arange(count))
    assert leaks(probe(data, "container", seed=0), "container")
    families = probe_families(data, jpeg, "container", seed=0)
    assert not leaks(families["chroma subsampling"], "container")
    families = probe_families(data, ~fake, "container", seed=0)
    assert families["chroma subsampling"]["reason"] == "no fakes among the JPEG files"


def test_too_few_images_are_said_and_alike_ones_are_chance():
    few = probe(pixels(20, 0), "pixels", seed=0)
    assert few["auroc"] is None and few["reason"] == "10 photographs, expected at least 15"
    assert cannot_say(few, "pixels") == few["reason"]
    data = pixels(60, 0)
    one_class = probe(Data(data.features, np.zeros(60, bool), data.group), "pixels", seed=0)
    assert one_class["auroc"] is None and one_class["reason"] == "no fakes"
    grouped = probe(Data(data.features, data.fake, data.group % 20), "pixels", seed=0)
    assert grouped["reason"] == "30 photographs in 10 groups, expected at least 15"
    wide = probe(pixels(40, 1), "pixels", seed=0)
    assert "too wide an interval" in cannot_say(wide, "pixels")
    alike = probe(Data(np.ones((60, 3)), data.fake, data.group), "container", seed=0)
    assert (alike["auroc"], alike["low"], alike["high"]) == (0.5, 0.5, 0.5)
    assert cannot_say(alike, "container") == ""


def test_the_sample_is_half_photographs_and_the_rest_even():
    available = {"nature": 1000, "a": 500, "b": 500, "c": 20}
    assert shares(available, 400) == {"nature": 200, "a": 90, "b": 90, "c": 20}
    assert shares(available, 0) == shares(available, 9999) == available
    assert shares({"nature": 10, "a": 500}, 100) == {"nature": 10, "a": 90}
    assert shares({"nature": 500, "a": 10}, 100) == {"nature": 90, "a": 10}
    assert shares({"nature": 500}, 100) == {"nature": 100}
    assert shares({"a": 500, "b": 500}, 101) == {"a": 50, "b": 51}
