"""Open set scores against an independent count over pairs of images."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dataio.core.errors import UserError
from engines.evaluate.columns import Labels
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.metrics_text import format_metrics
from engines.evaluate.open_set import compute_open_set, held_out_of, oscr, rejection
from engines.evaluate.predictions import build_table
from tests.random_predictions import GENIMAGE, random_arrays


def oscr_by_pairs(known: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> float:
    """The share of (known, unknown) pairs in which the known one is named right and is kept longer."""
    pairs = [r * ((k < u) + 0.5 * (k == u)) for k, r in zip(known, right, strict=True) for u in unknown]
    return sum(pairs) / len(pairs)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([2, 5, 1000]))
def test_oscr_is_a_share_of_pairs(known: int, unknown: int, seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    scores = [np.round(random.random(n) * levels) / levels for n in (known, unknown)]
    right = random.random(known) < 0.7
    assert oscr(scores[0], right, scores[1]) == pytest.approx(oscr_by_pairs(scores[0], right, scores[1]))


def restated(arrays: Any, held_out: tuple[str, ...]) -> dict[str, float]:
    """Image by image, in plain Python, from probabilities as the table keeps them."""
    names = (*arrays.generators, *arrays.unseen)
    score, right, unknown = [], [], []
    for label, p in zip(arrays.generator, arrays.generator_probability.astype(np.float32), strict=True):
        trained = {name: float(p[i]) for i, name in enumerate(arrays.generators) if name not in held_out}
        answer = max(trained, key=lambda name: trained[name])
        score.append(1 - trained[answer])
        right.append(answer == names[label])
        unknown.append(names[label] in held_out)
    s, r, u = np.array(score), np.array(right), np.array(unknown)
    return {
        "auroc": roc_auc_score(u, s),
        "oscr": oscr_by_pairs(s[~u], r[~u], s[u]),
        "closed_set_accuracy": r[~u].mean(),
    }


def test_held_out_generators_of_the_label_space() -> None:
    """As in leave-one-out training: the model has outputs for them that were never trained."""
    arrays = random_arrays(250, 1)
    reasons: dict[str, str] = {}
    found = compute_open_set(Labels(build_table(arrays)), reasons, held_out=["glide", "adm"])
    assert found is not None and reasons == {}
    assert found["held_out"] == ["adm", "glide"]
    assert found["unknown"] == np.isin(arrays.generator, [1, 3]).sum() == 250 - found["known"]
    for key, value in restated(arrays, ("adm", "glide")).items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
    one = restated(
        replace(
            arrays,
            **{
                key: getattr(arrays, key)[arrays.generator != 1]
                for key in ("generator", "generator_probability")
            },
        ),
        ("adm", "glide"),
    )
    assert found["per_generator"]["glide"]["auroc"] == pytest.approx(one["auroc"], abs=1e-6)
    assert found["per_generator"]["glide"]["oscr"] == pytest.approx(one["oscr"], abs=1e-6)


def test_generators_outside_of_the_label_space() -> None:
    arrays = random_arrays(250, 2)
    # Every image of wukong, the last label, is now of a generator without an output.
    p = arrays.generator_probability[:, :8]
    arrays = replace(
        arrays,
        generators=GENIMAGE[:8],
        unseen=("dalle",),
        generator_probability=p / p.sum(1, keepdims=True),
    )
    metrics = compute_metrics(build_table(arrays))
    found = metrics["open_set"]
    assert found["held_out"] == ["dalle"] and "1 - largest" in found["score"]
    for key, value in restated(arrays, ("dalle",)).items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
    # It is fake, and found so or not; but it cannot be named, and counts in no attribution.
    own = arrays.generator == 8
    guess = arrays.generator_probability.argmax(1)
    overall, part = metrics["overall"], metrics["per_generator"]["dalle"]
    assert overall["generator_error"] == pytest.approx((guess != arrays.generator)[~own].mean())
    assert part["n"] == own.sum() and part["generator_error"] is None
    assert "label space" in metrics["reasons"]["per_generator.dalle.generator_error"]
    assert part["real_fake_error"] == pytest.approx((p[own, 0] / p[own].sum(1) > 0.5).mean())
    assert np.sum(metrics["confusion"]["generator"]["matrix"]) == 250
    assert "never seen: dalle" in format_metrics(metrics)


def test_the_checkpoint_may_say_what_it_was_not_trained_on() -> None:
    table = build_table(replace(random_arrays(60, 3), checkpoint={"held_out": ["vqdm"]}))
    assert held_out_of(table) == ("vqdm",)
    assert held_out_of(table, ["adm"]) == ("adm",)
    found = compute_metrics(table)["open_set"]
    assert found["held_out"] == ["vqdm"]


def test_small_differences_near_certainty_are_kept() -> None:
    p = np.array([[1.0, 1e-12, 0.0], [1.0, 3e-12, 0.0], [0.2, 0.1, 0.7]], np.float32)
    score, answer = rejection(p, np.array([True, True, False]))
    assert score == pytest.approx([1e-12, 3e-12, 0.8], rel=1e-6)
    assert answer.tolist() == [0, 0, 0]


def test_nothing_held_out_is_null_and_missing_images_have_reasons() -> None:
    table = build_table(random_arrays(40, 4))
    metrics = compute_metrics(table)
    assert metrics["open_set"] is None
    assert metrics["reasons"]["open_set"] == "no generator was held out"
    arrays = random_arrays(40, 4)
    reasons: dict[str, str] = {}
    found = compute_open_set(
        Labels(build_table(arrays).filter(arrays.generator != 1)), reasons, held_out=["adm"]
    )
    assert found is not None and found["auroc"] is None and found["oscr"] is None
    assert reasons["open_set.auroc"] == "no images of held-out generators"
    assert found["closed_set_accuracy"] is not None


@pytest.mark.parametrize("name", ["nature", "dalle"])
def test_a_name_that_cannot_be_held_out_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        compute_metrics(build_table(random_arrays(10, 5)), held_out=[name])
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
