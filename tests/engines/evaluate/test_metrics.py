import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_accuracy,
    multiclass_confusion_matrix,
)

from engines.evaluate.metrics import compute_metrics
from engines.evaluate.metrics_text import format_metrics
from engines.evaluate.predictions import PredictionArrays, build_table
from tests.random_predictions import GENIMAGE, make_arrays, random_arrays


def metrics_of(arrays: PredictionArrays) -> dict[str, Any]:
    metrics = compute_metrics(build_table(arrays))
    # Strict JSON: no NaN, no NumPy numbers.
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    _check_reasons(metrics)
    return metrics


def _check_reasons(metrics: dict[str, Any]) -> None:
    """A value is null exactly where there is a reason."""
    null: set[str] = set()

    def walk(value: Any, path: str) -> None:
        if value is None:
            null.add(path)
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)

    walk({key: value for key, value in metrics.items() if key not in ("checkpoint", "reasons")}, "")
    assert null == set(metrics["reasons"])
    assert all(metrics["reasons"].values())


def restated(arrays: PredictionArrays) -> dict[str, float]:
    """The overall errors image by image, in plain Python."""
    wrong: dict[str, list[bool]] = {}

    def count(name: str, is_wrong: bool) -> None:
        wrong.setdefault(name, []).append(is_wrong)

    merge = {5: 5, 6: 5}
    for g, o, p, top in zip(
        arrays.generator, arrays.object, arrays.generator_probability, arrays.object_top5, strict=True
    ):
        guess = max(range(len(p)), key=lambda i: (p[i], -i))
        count("generator_error", guess != g)
        count("generator_error_sd_merged", merge.get(guess, guess) != merge.get(g, g))
        p_fake = sum(p[1:])
        count("real_fake_error", (p_fake >= 0.5) != (g != 0))
        count("real_fake_error_argmax", (guess != 0) != (g != 0))
        count("wrong_real" if g == 0 else "wrong_fake", (p_fake >= 0.5) != (g != 0))
        if o < 0:
            continue
        count("object_error", top[0] != o)
        count("object_top5_error", o not in list(top))
        count("joint_error", guess != g or top[0] != o)
        if g == 0:
            count("object_error_nature", top[0] != o)
    errors = {name: sum(flags) / len(flags) for name, flags in wrong.items()}
    errors["accuracy_real"] = 1 - errors.pop("wrong_real")
    errors["accuracy_fake"] = 1 - errors.pop("wrong_fake")
    return errors


def auroc_by_pairs(fake: np.ndarray, score: np.ndarray) -> float:
    """The share of (fake, real) pairs in the right order; ties count half."""
    pairs = [(f > r) + 0.5 * (f == r) for f, r in itertools.product(score[fake], score[~fake])]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(4))
def test_overall_errors_equal_a_plain_count(seed: int) -> None:
    arrays = random_arrays(300, seed)
    overall = metrics_of(arrays)["overall"]
    for name, value in restated(arrays).items():
        assert overall[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("levels", [0, 1])
def test_rankings_equal_torchmetrics_and_pairs(levels: int) -> None:
    arrays = random_arrays(300, 5, levels=levels)
    metrics = metrics_of(arrays)
    score = arrays.generator_probability[:, 1:].sum(1)
    for index, name in enumerate(GENIMAGE):
        # Nature stands for all generators together: the overall figures.
        rows = (arrays.generator == index) | (arrays.generator == 0) if index else np.ones(300, bool)
        found = metrics["per_generator"][name] if index else metrics["overall"]
        fake = arrays.generator[rows] != 0
        assert found["auroc"] == pytest.approx(auroc_by_pairs(fake, score[rows]), abs=1e-12)
        preds, target = torch.from_numpy(score[rows]), torch.from_numpy(fake.astype(int))
        # torchmetrics keeps its curves in float32.
        assert found["auroc"] == pytest.approx(binary_auroc(preds, target).item(), abs=1e-6)
        assert found["ap"] == pytest.approx(binary_average_precision(preds, target).item(), abs=1e-6)


def test_confusion_and_errors_equal_torchmetrics() -> None:
    arrays = random_arrays(300, 6)
    metrics = metrics_of(arrays)
    guess = torch.from_numpy(arrays.generator_probability)
    true = torch.from_numpy(arrays.generator)
    matrix = multiclass_confusion_matrix(guess, true, num_classes=9)
    assert metrics["confusion"]["generator"] == {"labels": list(GENIMAGE), "matrix": matrix.tolist()}
    accuracy = multiclass_accuracy(guess, true, num_classes=9, average="micro")
    assert metrics["overall"]["generator_error"] == pytest.approx(1 - accuracy.item(), abs=1e-6)
    real_fake = np.array(metrics["confusion"]["real_fake"]["matrix"])
    assert real_fake.sum() == 300
    assert metrics["overall"]["real_fake_error"] == pytest.approx((real_fake[0, 1] + real_fake[1, 0]) / 300)


def test_per_generator_is_overall_of_its_rows() -> None:
    arrays = random_arrays(300, 7)
    metrics = metrics_of(arrays)
    table = build_table(arrays)
    for index, name in enumerate(GENIMAGE):
        part = compute_metrics(table.filter(arrays.generator == index))["overall"]
        found = metrics["per_generator"][name]
        assert found["n"] == (arrays.generator == index).sum() == metrics["counts"]["generators"][name]
        for key in ("generator_error", "object_error"):
            assert found[key] == part[key]
        assert part["real_fake_error"] is None
        right = part["accuracy_fake"] if index else part["accuracy_real"]
        assert found["real_fake_error"] == pytest.approx(1 - right)


def test_counts() -> None:
    arrays = random_arrays(100, 8)
    counts = metrics_of(arrays)["counts"]
    real, known = arrays.generator == 0, arrays.object >= 0
    assert counts["images"] == 100
    assert counts["real"] == real.sum() and counts["fake"] == (~real).sum()
    assert counts["object_known"] == known.sum()
    assert counts["object_known_nature"] == (known & real).sum()
    assert sum(counts["generators"].values()) == 100


def test_exactly_half_is_called_fake() -> None:
    """P(fake) = 0.5 counts as fake, though the likeliest generator is nature."""
    tie = [0.5, 0.25, 0.25]
    metrics = metrics_of(make_arrays([0, 1], [tie, tie], generators=("nature", "adm", "glide")))
    assert metrics["confusion"]["real_fake"]["matrix"] == [[0, 1], [0, 1]]
    overall = metrics["overall"]
    assert overall["real_fake_error"] == 0.5
    assert overall["accuracy_real"] == 0.0 and overall["accuracy_fake"] == 1.0
    assert overall["real_fake_error_argmax"] == 0.5
    assert metrics["per_generator"]["adm"]["generator_error"] == 1.0
    assert overall["auroc"] == 0.5 and overall["ap"] == 0.5


def test_the_two_real_fake_errors_differ_where_fakes_share_the_probability() -> None:
    rows = [[0.4, 0.3, 0.3], [0.9, 0.1, 0.0]]
    metrics = metrics_of(make_arrays([1, 0], rows, generators=("nature", "adm", "glide")))
    assert metrics["overall"]["real_fake_error"] == 0.0
    assert metrics["overall"]["real_fake_error_argmax"] == 0.5


def test_stable_diffusion_versions_merge_both_ways_and_nothing_else() -> None:
    one_hot = np.eye(9)
    pairs = [(5, 6), (6, 5), (5, 5), (5, 8), (8, 6), (0, 5)]
    metrics = metrics_of(make_arrays([t for t, _ in pairs], [one_hot[g] for _, g in pairs]))
    assert metrics["overall"]["generator_error"] == pytest.approx(5 / 6)
    assert metrics["overall"]["generator_error_sd_merged"] == pytest.approx(3 / 6)


def test_merged_needs_both_versions() -> None:
    metrics = metrics_of(make_arrays([1], [[0.1, 0.9]], generators=("nature", "stable_diffusion_1_4")))
    assert metrics["overall"]["generator_error_sd_merged"] is None
    assert "stable_diffusion_1_5" in metrics["reasons"]["overall.generator_error_sd_merged"]


def test_one_image() -> None:
    metrics = metrics_of(make_arrays([3], [np.eye(9)[3]], [4], [[4, 1, 2, 3, 0]]))
    overall, reasons = metrics["overall"], metrics["reasons"]
    for key in ("generator_error", "object_error", "object_top5_error", "joint_error"):
        assert overall[key] == 0.0
    for key in ("auroc", "ap", "accuracy_real", "object_error_nature"):
        assert overall[key] is None
    assert reasons["overall.auroc"] == "no images of nature"
    assert reasons["per_generator.adm.auroc"] == "no images of adm and nature"
    assert reasons["per_generator.adm.generator_error"] == "no images"


def test_no_fakes() -> None:
    metrics = metrics_of(make_arrays([0, 0], [np.eye(9)[0], np.eye(9)[1]]))
    assert metrics["overall"]["generator_error"] == 0.5
    assert metrics["overall"]["auroc"] is None and metrics["overall"]["accuracy_fake"] is None
    assert metrics["reasons"]["overall.auroc"] == "no images of any generator"
    assert metrics["overall"]["object_error"] is None
    assert metrics["overall"]["joint_error"] is None
    assert "known object" in metrics["reasons"]["overall.joint_error"]


_TWO_CLASSES = [
    "real_fake_error",
    "real_fake_error_argmax",
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "ap",
    "eer",
    "tpr_at_fpr_1",
    "tpr_at_fpr_5",
    "ece",
    "nll",
    "brier",
]


@pytest.mark.parametrize(("label", "missing"), [(0, "any generator"), (1, "nature")])
def test_one_class_alone_has_no_figure_that_a_constant_answer_would_win(label: int, missing: str) -> None:
    arrays = make_arrays([label] * 5, [np.eye(9)[label]] * 5)
    metrics = metrics_of(arrays)
    for key in _TWO_CLASSES:
        assert metrics["overall"][key] is None
        assert metrics["reasons"][f"overall.{key}"] == f"no images of {missing}"
    assert metrics["overall"]["generator_error"] == 0.0
    assert metrics["per_generator"][GENIMAGE[label]]["real_fake_error"] == 0.0
    assert metrics["intervals"]["images"]["overall"]["real_fake_error"] is None
    text = format_metrics(metrics)
    assert f"no images of {missing}: no figure of real against fake" in text
    shown = [line.split() for line in text.splitlines() if line.startswith("real/fake, P(fake)")]
    assert [words[-1] for words in shown] == ["-"]


def test_no_images() -> None:
    metrics = metrics_of(make_arrays([], np.zeros((0, 9)), top5=np.zeros((0, 5), np.int64)))
    assert set(metrics["overall"].values()) == {None}
    assert metrics["counts"]["images"] == 0
    assert np.array(metrics["confusion"]["generator"]["matrix"]).shape == (9, 9)
    assert "0 images" in format_metrics(metrics)


def test_class_that_never_occurs_keeps_its_place() -> None:
    """Labels 1 and 3 of 9 occur: rows and columns of the others stay, empty."""
    metrics = metrics_of(make_arrays([1, 3, 3], np.eye(9)[[1, 1, 3]]))
    matrix = np.array(metrics["confusion"]["generator"]["matrix"])
    assert matrix[1, 1] == 1 and matrix[3, 1] == 1 and matrix[3, 3] == 1 and matrix.sum() == 3
    assert list(metrics["per_generator"]) == list(GENIMAGE)


def test_top5_of_five_objects_says_nothing() -> None:
    metrics = metrics_of(make_arrays([0], [np.eye(9)[0]], [2], objects=5))
    assert metrics["overall"]["object_error"] == 1.0
    assert metrics["overall"]["object_top5_error"] is None


def test_no_object_head() -> None:
    metrics = metrics_of(make_arrays([0, 1], np.eye(9)[[0, 1]], objects=0))
    assert metrics["overall"]["object_error"] is None
    assert metrics["overall"]["generator_error"] == 0.0


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10_000))
@example(21, 1933)  # scikit-learn's AP is 1 + 2e-16
def test_order_of_rows_does_not_matter(count: int, seed: int) -> None:
    table = build_table(random_arrays(count, seed, levels=2))
    shuffled = table.take(np.random.default_rng(seed).permutation(count))
    metrics = compute_metrics(table)
    again = compute_metrics(shuffled)
    _check_reasons(metrics)
    for part in ("counts", "confusion", "intervals", "reasons"):
        assert metrics[part] == again[part]
    for key, value in metrics["overall"].items():
        assert again["overall"][key] == pytest.approx(value, abs=1e-12)
        # All are fractions but the likelihood, in nats.
        assert value is None or 0 <= value <= (np.inf if key.startswith("nll") else 1)


def test_metrics_of_several_chunks_equal_those_of_one() -> None:
    import pyarrow as pa

    table = build_table(random_arrays(50, 9))
    pieces = pa.concat_tables([table.slice(0, 7), table.slice(7, 1), table.slice(8)])
    assert compute_metrics(pieces) == compute_metrics(table)


def test_table_leaves_out_generators_without_images() -> None:
    text = format_metrics(metrics_of(make_arrays([0, 1], np.eye(9)[[0, 1]])))
    assert [name for name in GENIMAGE if f"\n{name} " in text] == ["nature", "adm"]


def test_table_for_the_terminal() -> None:
    arrays = random_arrays(200, 10)
    metrics = metrics_of(arrays)
    text = format_metrics(metrics)
    wrong = round(metrics["overall"]["generator_error"] * 200)
    assert f"{wrong / 2:.2f} %  {wrong} of 200" in text
    known = metrics["counts"]["object_known"]
    joint = round(metrics["overall"]["joint_error"] * known)
    assert f"{joint} of {known}" in text
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in GENIMAGE)
    assert f"AUROC {metrics['overall']['auroc']:.4f}" in text
    assert max(map(len, text.splitlines())) <= 100
