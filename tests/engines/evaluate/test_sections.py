"""Version 2 of metrics.json: detection, calibration, objects, attribution, intervals, odd input."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, f1_score, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

from dataio.core.errors import UserError
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.metrics_text import format_metrics
from engines.evaluate.predictions import build_table
from engines.evaluate.sections.detection import DETECTION
from engines.stats import scores
from engines.stats.significance import wilson
from tests.random_predictions import CALIBRATION, GENIMAGE, make_arrays, random_arrays


def _metrics(arrays: Any, **options: Any) -> dict[str, Any]:
    metrics = compute_metrics(build_table(arrays), **{"resamples": 50, **options})
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    return metrics


def _p_fake(arrays: Any) -> np.ndarray:
    return arrays.generator_probability[:, 1:].sum(1)


def _expected(fake: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Detection by scikit-learn and the formulas that test_scores.py compares."""
    called = p >= 0.5
    return {
        "accuracy": accuracy_score(fake, called),
        "balanced_accuracy": balanced_accuracy_score(fake, called),
        "accuracy_real": accuracy_score(fake[~fake], called[~fake]),
        "accuracy_fake": accuracy_score(fake[fake], called[fake]),
        "auroc": roc_auc_score(fake, p),
        "ap": scores.average_precision(fake, p),
        **scores.operating_points(fake, p),
        "ece": scores.calibration_error(fake, p),
        "nll": scores.nll(fake, p),
        "brier": brier_score_loss(fake, p),
    }


def test_version_is_2_and_the_interface_keys_are_there() -> None:
    metrics = _metrics(random_arrays(50, 0))
    assert (metrics["schema"], metrics["version"]) == ("telltale-metrics", 2)
    names = ("generator_error", "real_fake_error", "real_fake_error_argmax", "real_fake_error_calibrated")
    assert set(metrics["overall"]) >= {*names, "object_error", "joint_error", "auroc"}


def test_detection_overall_per_generator_and_per_object() -> None:
    arrays = random_arrays(400, 1)
    metrics, p, fake = _metrics(arrays), _p_fake(arrays), arrays.generator != 0
    parts = {"overall": (metrics["overall"], np.ones(400, bool))}
    for index, name in enumerate(GENIMAGE[1:], start=1):
        parts[name] = (metrics["per_generator"][name], (arrays.generator == index) | ~fake)
    for name, found in metrics["per_object"].items():
        rows = arrays.object == int(name.split()[1])
        assert found["n"] == rows.sum() and found["fake"] == (rows & fake).sum()
        wrong = arrays.object_top5[rows, 0] != arrays.object[rows]
        assert found["object_error"] == pytest.approx(wrong.mean())
        parts[name] = (found, rows)
    assert len(metrics["per_object"]) == 12
    for where, (found, rows) in parts.items():
        if not fake[rows].all():
            for key, value in _expected(fake[rows], p[rows]).items():
                assert found[key] == pytest.approx(value, abs=1e-9), (where, key)
    assert metrics["per_generator"]["nature"]["accuracy"] is None


def test_attribution_with_stable_diffusion_apart_and_merged() -> None:
    arrays = random_arrays(300, 2)
    metrics = _metrics(arrays)
    guess = arrays.generator_probability.argmax(1)
    found = metrics["attribution"]
    f1 = multiclass_f1_score(torch.from_numpy(guess), torch.from_numpy(arrays.generator), 9, average="macro")
    assert found["macro_f1"] == pytest.approx(f1.item(), abs=1e-6)
    assert found["accuracy"] == pytest.approx(1 - metrics["overall"]["generator_error"])
    merged = [
        np.array(["sd" if "stable" in GENIMAGE[i] else GENIMAGE[i] for i in x])
        for x in (arrays.generator, guess)
    ]
    assert found["macro_f1_sd_merged"] == pytest.approx(f1_score(*merged, average="macro"))
    assert found["accuracy_sd_merged"] == pytest.approx(np.mean(merged[0] == merged[1]))
    confusion = metrics["confusion"]["generator_sd_merged"]
    apart = np.array(metrics["confusion"]["generator"]["matrix"])
    assert confusion["labels"] == [*GENIMAGE[:5], "stable_diffusion", *GENIMAGE[7:]]
    both = np.array(confusion["matrix"])
    assert both[5, 5] == apart[5:7, 5:7].sum() and both.sum() == 300
    assert both[5, 7] == apart[5:7, 8].sum()


def test_f1_ignores_a_class_that_is_neither_true_nor_predicted() -> None:
    metrics = _metrics(make_arrays([1, 3, 3], np.eye(9)[[1, 1, 3]]))
    assert metrics["attribution"]["macro_f1"] == pytest.approx(2 / 3)
    assert "adm" in metrics["per_generator"] and metrics["per_generator"]["vqdm"]["auroc"] is None


def test_objects_on_photographs_and_fakes() -> None:
    arrays = random_arrays(300, 3)
    overall = _metrics(arrays)["overall"]
    for suffix, own in (("nature", arrays.generator == 0), ("fake", arrays.generator != 0)):
        rows = own & (arrays.object >= 0)
        top5, true = arrays.object_top5[rows], arrays.object[rows]
        assert overall[f"object_error_{suffix}"] == pytest.approx((top5[:, 0] != true).mean())
        missed = ~(top5 == true[:, None]).any(1)
        assert overall[f"object_top5_error_{suffix}"] == pytest.approx(missed.mean())


def test_mean_deviation_and_worst_over_generators() -> None:
    metrics = _metrics(random_arrays(300, 4))
    for key, found in metrics["over_generators"].items():
        values = {name: metrics["per_generator"][name][key] for name in GENIMAGE[1:]}
        assert found["n"] == 8
        assert found["mean"] == pytest.approx(np.mean(list(values.values())))
        assert found["std"] == pytest.approx(np.std(list(values.values()), ddof=1))
        extreme = max(values.values()) if key.endswith("error") else min(values.values())
        assert found["worst"]["value"] == extreme == values[found["worst"]["generator"]]


def test_the_oracle_is_an_upper_bound_and_is_called_so() -> None:
    metrics = _metrics(random_arrays(300, 5))
    oracle = metrics["oracle_upper_bound"]
    assert "upper bound" in oracle["note"]
    assert oracle["overall"]["accuracy"] >= metrics["overall"]["accuracy"]
    for name in GENIMAGE[1:]:
        assert oracle["per_generator"][name]["accuracy"] >= metrics["per_generator"][name]["accuracy"]
    assert not any("oracle" in key for key in metrics["overall"])


def test_calibrated_decision_against_a_plain_restatement() -> None:
    arrays = replace(random_arrays(500, 6), checkpoint={"calibration": CALIBRATION})
    metrics, fake = _metrics(arrays), arrays.generator != 0
    overall = metrics["overall"]
    p = expit((logit(np.clip(_p_fake(arrays), 1e-12, 1 - 1e-12)) - 0.6) / 1.7)
    called, unsure = p >= 0.72, (p >= 0.4) & (p < 0.72)
    assert 0 < unsure.mean() < 1
    assert overall["real_fake_error_calibrated"] == pytest.approx((called != fake).mean())
    assert overall["false_alarm_rate_calibrated"] == pytest.approx(called[~fake].mean())
    assert overall["detection_rate_calibrated"] == pytest.approx(called[fake].mean())
    assert overall["unsure_share_calibrated"] == pytest.approx(unsure.mean())
    assert overall["real_fake_error_sure_calibrated"] == pytest.approx((called != fake)[~unsure].mean())
    ece = binary_calibration_error(torch.from_numpy(p), torch.from_numpy(fake.astype(int)), n_bins=15)
    assert overall["ece_calibrated"] == pytest.approx(ece.item(), abs=1e-6)
    assert overall["brier_calibrated"] == pytest.approx(brier_score_loss(fake, p))
    assert overall["nll_calibrated"] == pytest.approx(-np.log(np.where(fake, p, 1 - p)).mean())
    for index, name in enumerate(GENIMAGE):
        rows = arrays.generator == index
        found = metrics["per_generator"][name]["real_fake_error_calibrated"]
        assert found == pytest.approx((called != fake)[rows].mean())
    matrix = np.array(metrics["confusion"]["real_fake_calibrated"]["matrix"])
    assert matrix[0, 1] == (called & ~fake).sum() and matrix.sum() == 500
    text = format_metrics(metrics)
    assert "frozen threshold" in text and "unsure of" in text
    assert max(map(len, text.splitlines())) <= 100


def test_without_calibration_everything_calibrated_is_null_with_the_reason() -> None:
    metrics = _metrics(random_arrays(50, 7))
    keys = [key for key in metrics["overall"] if key.endswith("_calibrated")]
    assert len(keys) == 8
    for key in keys:
        assert metrics["overall"][key] is None
        assert metrics["reasons"][f"overall.{key}"] == "no calibration"
    assert "frozen" not in format_metrics(metrics)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": None}, "NoneType"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"shift": float("nan")}, "finite"),
        ({"unsure": [0.1]}, "unpack"),
        ({"threshold": "high"}, "'high'"),
    ],
)
def test_a_damaged_calibration_is_one_line(change: dict[str, Any], words: str) -> None:
    arrays = replace(random_arrays(20, 8), checkpoint={"calibration": {**CALIBRATION, **change}})
    with pytest.raises(UserError) as caught:
        compute_metrics(build_table(arrays))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    lacking = {key: value for key, value in CALIBRATION.items() if key != "shift"}
    with pytest.raises(UserError, match="'shift' is missing"):
        compute_metrics(build_table(replace(arrays, checkpoint={"calibration": lacking})))


def test_intervals_hold_the_value_and_follow_the_seed() -> None:
    arrays = random_arrays(300, 9)
    metrics = _metrics(arrays, resamples=200)
    intervals = metrics["intervals"]
    assert (intervals["level"], intervals["resamples"], intervals["seed"]) == (0.95, 200, 0)
    assert intervals["headline"] == "images" and intervals["groups"] is None
    assert "bootstrap" in intervals["method"]
    overall = intervals["images"]["overall"]
    for key in (
        "generator_error",
        "real_fake_error",
        "object_error",
        "joint_error",
        "auroc",
        "ap",
        "accuracy",
    ):
        low, high = overall[key]
        assert low < metrics["overall"][key] < high, key
    for name in GENIMAGE[1:]:
        low, high = intervals["images"]["per_generator"][name]["auroc"]
        assert low < metrics["per_generator"][name]["auroc"] < high
    low, high = intervals["generators"]["auroc"]
    assert low < metrics["over_generators"]["auroc"]["mean"] < high
    assert _metrics(arrays, resamples=200) == metrics
    assert _metrics(arrays, resamples=200, seed=1)["intervals"] != intervals


def test_resampled_figures_of_the_images_themselves_are_the_values() -> None:
    """The bootstrap's formulas on weights of 1 equal those of the sections."""
    from engines.evaluate.columns import Labels
    from engines.evaluate.intervals import Headline, sample_of

    arrays = replace(random_arrays(300, 10, levels=2), checkpoint={"calibration": CALIBRATION})
    metrics, t = _metrics(arrays), Labels(build_table(arrays))
    figures = Headline(t, sample_of(t))(np.ones((1, 300)))
    assert len(figures.overall) >= 20
    for key, values in figures.overall.items():
        assert values[0] == pytest.approx(metrics["overall"][key], abs=1e-9), key
    for key, each in figures.each.items():
        for index, name in enumerate(GENIMAGE):
            value = metrics["per_generator"][name][key]
            if value is not None:
                assert each[0, index] == pytest.approx(value, abs=1e-9), (key, name)


def test_groups_widen_the_interval_where_images_repeat() -> None:
    """Every image four times: the honest interval is that of a quarter of the images."""
    one = random_arrays(100, 11)
    rows = np.repeat(np.arange(100), 4)
    four = replace(
        one,
        sample_id=np.arange(400),
        key=[str(i) for i in range(400)],
        generator=one.generator[rows],
        object=one.object[rows],
        generator_probability=one.generator_probability[rows],
        object_top5=one.object_top5[rows],
        group=[f"g{i}" for i in rows],
    )
    metrics = _metrics(four, resamples=400)
    assert metrics["counts"]["groups"] == 100
    assert metrics["intervals"]["headline"] == "groups"

    def width(found: list[float]) -> float:
        return found[1] - found[0]

    over = {name: metrics["intervals"][name]["overall"]["generator_error"] for name in ("images", "groups")}
    assert width(over["groups"]) == pytest.approx(2 * width(over["images"]), rel=0.25)
    assert "over groups" in format_metrics(metrics)


def test_no_error_at_all_is_not_certainty() -> None:
    """Of 30 right answers, the share has Wilson's interval and AUROC none."""
    metrics = _metrics(make_arrays([0, 1] * 15, np.eye(9)[[0, 1] * 15]))
    overall = metrics["intervals"]["images"]["overall"]
    assert overall["real_fake_error"] == pytest.approx(wilson(0, 30))
    assert overall["accuracy_real"] == pytest.approx(wilson(15, 15))
    assert metrics["intervals"]["images"]["per_generator"]["adm"]["generator_error"] == wilson(0, 15)
    assert metrics["intervals"]["images"]["per_generator"]["adm"]["accuracy"] == wilson(30, 30)
    assert overall["auroc"] is None
    assert "too few errors" in metrics["reasons"]["intervals.images.overall.auroc"]
    assert format_metrics(metrics)


def _one(label: int) -> Any:
    return make_arrays([label], [np.eye(9)[label]], [4], [[4, 1, 2, 3, 0]])


@pytest.mark.parametrize(
    "arrays",
    [
        _one(3),
        _one(0),
        make_arrays([0, 0], np.eye(9)[[0, 1]]),
        make_arrays([1, 1], np.eye(9)[[0, 1]]),
        make_arrays([], np.zeros((0, 9)), top5=np.zeros((0, 5), np.int64)),
        make_arrays([0, 1], [[0.5, 0.5]] * 2, generators=("nature", "fake"), objects=0),
        make_arrays([0], [[1.0]], generators=("nature",)),
    ],
    ids=["one fake", "one real", "no fakes", "no reals", "no images", "ties, no objects", "only nature"],
)
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_odd_tables_have_reasons_and_never_crash(arrays: Any, calibration: Any) -> None:
    if calibration is not None:
        arrays = replace(arrays, checkpoint={"calibration": calibration}, group=["g"] * len(arrays.key))
    metrics = _metrics(arrays)
    fake = arrays.generator != 0
    for key in DETECTION:
        value = metrics["overall"][key]
        assert (value is None) == (f"overall.{key}" in metrics["reasons"])
        if key in ("auroc", "ap", "eer", "tpr_at_fpr_1", "balanced_accuracy") and len(set(fake)) < 2:
            assert value is None and "no images" in metrics["reasons"][f"overall.{key}"]
    assert max(map(len, format_metrics(metrics).splitlines())) <= 100
