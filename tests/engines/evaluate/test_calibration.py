"""Calibrations: the fit against scikit-learn, the thresholds by counting, and what lies beside a checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from dataio.core.errors import UserError
from engines.checkpoint.files import weights_sha256
from engines.checkpoint.load_model import load_model
from engines.evaluate.calibrate import calibrate_checkpoint
from engines.evaluate.calibration import (
    Calibration,
    calibration_path,
    load_calibration,
    save_calibration,
)
from engines.evaluate.calibration_fit import false_alarm_threshold, fit_calibration, miss_threshold
from engines.evaluate.predictions import PredictionArrays, build_table, write_predictions
from engines.export.to_safetensors import export_checkpoint
from tests.support import write_detector


def _draw(images: int, temperature: float, shift: float, seed: int = 0):
    """P(fake) of a detector whose calibration is known, and the truth."""
    random = np.random.default_rng(seed)
    z = random.normal(0, 2, images) * temperature - shift
    fake = random.random(images) < expit((z + shift) / temperature)
    return expit(z), fake


def _fit(p, fake, **changes):
    return fit_calibration(p, fake, **{"split": "val", "weights_sha256": "0" * 64, **changes})


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 0.0), (2.5, -1.0), (0.6, 0.8)])
def test_a_known_miscalibration_is_found(temperature, shift):
    p, fake = _draw(40_000, temperature, shift)
    found = _fit(p, fake)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.shift == pytest.approx(shift, abs=0.06)
    assert found.after["nll"] <= found.before["nll"] + 1e-9 and found.after["ece"] < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_scikit_learns_logistic_regression_on_the_logit(seed):
    p, fake = _draw(500, 3.0, 0.7, seed)
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit(p)[:, None], fake)
    found = _fit(p, fake)
    assert 1 / found.temperature == pytest.approx(oracle.coef_[0, 0], rel=1e-4)
    assert found.shift / found.temperature == pytest.approx(oracle.intercept_[0], abs=1e-4)
    np.testing.assert_allclose(found.probability(p), oracle.predict_proba(logit(p)[:, None])[:, 1], atol=1e-5)
    assert found.after["nll"] == pytest.approx(log_loss(fake, found.probability(p)))
    assert found.before["nll"] == pytest.approx(log_loss(fake, p))


def test_certain_probabilities_are_clipped_and_stay_in_order():
    found = _fit([0.0, 0.2, 1.0, 0.9, 0.1, 1.0], [False, False, True, True, True, False])
    p = found.probability([0.0, 1e-13, 0.5, 1.0])
    assert np.isfinite(p).all() and (np.diff(p) >= 0).all() and p[0] == p[1] and 0 < p[0] < p[-1] < 1


def test_splits_separated_without_error_do_not_make_it_certain():
    p = np.r_[np.full(20, 0.1), np.full(20, 0.9)]
    found = _fit(p, p > 0.5)
    # Platt: (N + 1) / (N + 2), the rule of succession.
    assert found.probability(0.9) == pytest.approx(21 / 22, abs=1e-4)
    assert found.probability(0.1) == pytest.approx(1 / 22, abs=1e-4)
    assert any("without an error" in note for note in found.notes)


def test_a_detector_that_is_wrong_about_everything_is_said_to_be():
    p, fake = _draw(400, 1.0, 0.0)
    found = _fit(1 - p, fake)
    assert found.temperature == pytest.approx(20) and any("bound" in note for note in found.notes)


scores = st.lists(
    st.tuples(st.sampled_from(np.linspace(0, 1, 12).tolist()), st.booleans()), min_size=2, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(scores, st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9]))
def test_thresholds_are_the_extreme_ones_by_counting(pairs, rate):
    p = np.array([score for score, _ in pairs])
    fake = np.array([label for _, label in pairs])
    fake[0], fake[1] = False, True
    # Every score and every gap between two is a candidate.
    marks = np.unique(np.r_[p, 0, 1])
    candidates = np.sort(np.r_[marks, (marks[1:] + marks[:-1]) / 2, 1.1])
    high = false_alarm_threshold(p, fake, rate)
    assert np.mean(p[~fake] >= high) <= rate
    lower = candidates[candidates < high]
    # None below decides otherwise and keeps the rate.
    for t in lower:
        same = ((p >= t) == (p >= high)).all()
        assert same or np.mean(p[~fake] >= t) > rate
    low = miss_threshold(p, fake, rate)
    assert np.mean(p[fake] < low) <= rate
    for t in candidates[candidates > low]:
        assert ((p < t) == (p < low)).all() or np.mean(p[fake] < t) > rate


def test_verdicts_keep_the_rates_they_promise():
    p, fake = _draw(5000, 2.0, 0.3)
    found = _fit(p, fake, false_alarm_rate=0.02, miss_rate=0.1)
    verdicts = np.array([found.verdict(one) for one in found.probability(p)])
    assert (
        np.mean(verdicts[~fake] == "AI-generated") <= 0.02 < np.mean(verdicts[~fake] == "AI-generated") + 1e-3
    )
    assert np.mean(verdicts[fake] == "real") <= 0.1 < np.mean(verdicts[fake] == "real") + 1e-3
    assert found.counts["unsure_real"] == np.sum(verdicts[~fake] == "unsure") > 0
    assert found.counts["unsure_fake"] == np.sum(verdicts[fake] == "unsure")
    assert found.counts["false_alarms"] == np.sum(verdicts[~fake] == "AI-generated")
    assert found.counts["misses"] == np.sum(verdicts[fake] == "real")


def test_no_band_where_one_threshold_serves_both():
    p, fake = _draw(5000, 2.0, 0.3)
    found = _fit(p, fake, miss_rate=1.0)
    assert found.unsure == (found.threshold, found.threshold)
    assert {found.verdict(one) for one in found.probability(p)} == {"real", "AI-generated"}


def test_too_few_photographs_for_the_rate_are_said():
    p, fake = _draw(60, 1.0, 0.0)
    few = _fit(p, fake)
    assert len(few.notes) == 1 and "takes at least 100 real images" in few.notes[0]
    assert few.counts["false_alarms"] == 0
    assert _fit(*_draw(1000, 1.0, 0.0)).notes == ()


@pytest.mark.parametrize(
    ("p", "fake", "words"),
    [
        ([0.1, 0.9], [True, True], "0 real and 2 generated"),
        ([0.1, 0.9], [False, False], "2 real and 0 generated"),
        ([], [], "0 real and 0 generated"),
        ([0.1, np.nan], [False, True], "image 1 is nan"),
        ([1.5, 0.2], [False, True], "image 0 is 1.5"),
    ],
)
def test_what_cannot_be_calibrated_on_is_one_line(p, fake, words):
    with pytest.raises(UserError, match=words) as caught:
        _fit(p, fake)
    assert "\n" not in str(caught.value)


@pytest.fixture
def checkpoint(tmp_path):
    return write_detector(tmp_path / "best.pt")


def _calibrate(checkpoint):
    weights = weights_sha256(load_model(checkpoint)[0].state_dict())
    return _fit(*_draw(300, 1.5, 0.2), weights_sha256=weights)


def _load(checkpoint):
    return load_calibration(checkpoint, load_model(checkpoint)[0].state_dict())


def test_a_predictions_table_keeps_what_decides():
    calibration = _fit(*_draw(500, 2.0, 0.3))
    kept = Calibration.from_summary(json.loads(json.dumps(calibration.summary())))
    p = calibration.probability(np.linspace(0, 1, 101))
    np.testing.assert_array_equal(kept.probability(np.linspace(0, 1, 101)), p)
    verdicts = np.array([calibration.verdict(value) for value in p])
    np.testing.assert_array_equal(kept.calls_fake(p), verdicts == "AI-generated")
    np.testing.assert_array_equal(kept.abstains(p), verdicts == "unsure")


def test_a_calibration_comes_back_from_its_file_and_out_of_an_export(checkpoint, tmp_path):
    assert _load(checkpoint) is None
    found = _calibrate(checkpoint)
    assert save_calibration(checkpoint, found) == tmp_path / "best.calibration.json"
    assert _load(checkpoint) == found
    assert _load(tmp_path) == found  # the run's folder
    export_checkpoint(checkpoint, tmp_path / "out")
    assert _load(tmp_path / "out") == found
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.calibration.json",
        "model.safetensors",
    ]
    calibration_path(checkpoint).unlink()
    export_checkpoint(checkpoint, tmp_path / "out")  # again, now without
    assert _load(tmp_path / "out") is None


def test_a_calibration_of_other_weights_is_refused(checkpoint):
    save_calibration(checkpoint, _calibrate(checkpoint))
    write_detector(checkpoint, seed=8)
    with pytest.raises(
        UserError, match=r"best.calibration.json: belongs to other weights .*telltale calibrate"
    ) as caught:
        _load(checkpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="belongs to other weights"):
        export_checkpoint(checkpoint, checkpoint.parent / "out")
    assert not (checkpoint.parent / "out").exists()


@pytest.mark.parametrize("damage", ["half", "version", "format", "nan", "list", "band", "missing", "unknown"])
def test_damaged_calibrations_are_one_line(checkpoint, damage):
    path = save_calibration(checkpoint, _calibrate(checkpoint))
    values = json.loads(path.read_text())
    text = {
        "half": path.read_text()[:100],
        "version": json.dumps({**values, "version": 9}),
        "format": json.dumps({**values, "format": "x"}),
        "nan": json.dumps({**values, "temperature": float("nan")}),
        "list": "[]",
        "band": json.dumps({**values, "unsure": [0.1, 0.2]}),
        "missing": json.dumps({k: v for k, v in values.items() if k != "shift"}),
        "unknown": json.dumps({**values, "colour": 1}),
    }[damage]
    path.write_text(text)
    with pytest.raises(UserError, match=r"best.calibration.json: not a calibration") as caught:
        _load(checkpoint)
    assert "\n" not in str(caught.value)


def test_the_digest_depends_on_names_types_shapes_and_values():
    state = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    others = [
        {**state, "a": state["a"].reshape(2, 3)},
        {**state, "a": state["a"].double()},
        {**state, "b": torch.tensor(4)},
        {"a": state["a"], "c": state["b"]},
    ]
    digests = {weights_sha256(one) for one in [state, *others]}
    assert len(digests) == 5 and weights_sha256(dict(reversed(state.items()))) in digests


def _predictions(path, **info):
    p, fake = _draw(200, 1.5, 0.2)
    table = build_table(
        PredictionArrays(
            sample_id=np.arange(200),
            key=[f"{n:09d}" for n in range(200)],
            generator=fake.astype(np.int64),
            object=np.full(200, -1),
            generator_probability=np.stack([1 - p, p], axis=1),
            object_top5=np.zeros((200, 3), np.int64),
            generators=("nature", "adm"),
            objects=("cat", "dog", "frog"),
            checkpoint=info,
        )
    )
    write_predictions(path, table)
    return str(path), p, fake


def test_predictions_already_made_are_taken(checkpoint, tmp_path):
    weights = weights_sha256(load_model(checkpoint)[0].state_dict())
    path, p, fake = _predictions(tmp_path / "p.parquet", weights_sha256=weights, split="val")
    done = calibrate_checkpoint(checkpoint=str(checkpoint), predictions=path)
    assert done is not None
    expected = _fit(p, fake, weights_sha256=weights)
    assert done[0] == replace(expected, notes=done[0].notes) == _load(checkpoint)
    # A table that an earlier telltale wrote.
    assert done[0].notes[:-1] == expected.notes and "do not say which data" in done[0].notes[-1]


@pytest.mark.parametrize(
    ("info", "flags", "words"),
    [
        ({}, {}, "does not say which weights"),
        ({"weights_sha256": "0" * 64, "split": "val"}, {}, "by other weights"),
        ({"split": "train"}, {}, "is of the train split"),
        ({"split": "val", "mirror": True}, {}, "--mirror"),
        ({"split": "test"}, {"split": "test"}, "--allow-test"),
        ({"split": "val"}, {"data": "shards"}, "either data"),
    ],
)
def test_predictions_of_something_else_are_refused(checkpoint, tmp_path, info, flags, words):
    if info and "weights_sha256" not in info:
        info = {**info, "weights_sha256": weights_sha256(load_model(checkpoint)[0].state_dict())}
    path, _, _ = _predictions(tmp_path / "p.parquet", **info)
    with pytest.raises(UserError, match=words) as caught:
        calibrate_checkpoint(checkpoint=str(checkpoint), predictions=path, **flags)
    assert "\n" not in str(caught.value) and not calibration_path(checkpoint).exists()


def test_a_missing_checkpoint_is_one_line(tmp_path):
    path, _, _ = _predictions(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no such checkpoint file"):
        calibrate_checkpoint(checkpoint=str(tmp_path / "none.pt"), predictions=path)
    assert [file.name for file in tmp_path.iterdir()] == ["p.parquet"]
