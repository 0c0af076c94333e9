"""Merging cells: balanced accuracy, gaps, curves and matrices, against figures worked out by hand."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from engines.config.protocol import ProtocolConfig
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.predictions import PredictionArrays, build_table
from engines.experiments.protocol_cells import Cell, Protocol, summarize_metrics
from engines.experiments.protocol_result import format_result, merge_cells

NAMES = ("nature", "adm", "glide", "vqdm")


class Made(Protocol):
    """A protocol whose cells are given."""

    def __init__(self, config):
        self.config, self.settings, self.cells = config, {"protocol": config.protocol}, []

    def run(self, cell: Cell, folder):
        raise AssertionError("nothing is run here")


def viewed(protocol, **keys):
    return Made(ProtocolConfig(protocol=protocol, checkpoint="c", shards="s", **keys))


def trained(protocol):
    return Made(ProtocolConfig(protocol=protocol, config="c", shards="s"))


def cell(name, auroc, balanced, per_generator=None, **about):
    values = {"auroc": auroc, "balanced_accuracy": balanced, "accuracy": balanced}
    counts = {"images": 8, "real": 4, "fake": 4, "left_out": 2, "unreadable": 0}
    return {"name": name, **about, "metrics": values, "per_generator": per_generator or {}, "counts": counts}


def test_a_summary_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels, count = np.r_[np.zeros(30, int), np.ones(9, int), np.full(21, 2)], 60
    p = rng.dirichlet(np.ones(4), count)
    arrays = PredictionArrays(
        sample_id=np.arange(count),
        key=[f"{n}" for n in range(count)],
        generator=labels,
        object=np.full(count, -1),
        generator_probability=p,
        object_top5=np.zeros((count, 1), int),
        generators=NAMES,
        objects=("thing",),
    )
    summary = summarize_metrics(compute_metrics(build_table(arrays)))
    fake, called = labels > 0, p[:, 1:].sum(1) >= 0.5
    assert summary["metrics"]["accuracy"] == pytest.approx(accuracy_score(fake, called))
    assert summary["metrics"]["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(fake, called))
    assert list(summary["per_generator"]) == ["adm", "glide"]  # vqdm has no images
    for number, name in ((1, "adm"), (2, "glide")):
        rows, values = (labels == 0) | (labels == number), summary["per_generator"][name]
        assert values["accuracy"] == pytest.approx(accuracy_score(fake[rows], called[rows]))
        assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(fake[rows], called[rows]))
        assert values["n"] == (labels == number).sum()
    assert summary["counts"] == {"images": 60, "real": 30, "fake": 30}


def test_a_summary_without_photographs_is_null_where_it_must_be():
    arrays = PredictionArrays(
        sample_id=np.arange(2),
        key=["a", "b"],
        generator=np.array([1, 1]),
        object=np.array([-1, -1]),
        generator_probability=np.array([[0.1, 0.9], [0.8, 0.2]]),
        object_top5=np.zeros((2, 1), int),
        generators=NAMES[:2],
        objects=("thing",),
    )
    summary = summarize_metrics(compute_metrics(build_table(arrays)))
    assert summary["metrics"]["accuracy_fake"] == summary["per_generator"]["adm"]["accuracy_fake"] == 0.5
    for values in (summary["metrics"], summary["per_generator"]["adm"]):
        assert values["accuracy"] is values["balanced_accuracy"] is values["auroc"] is None


def test_gaps_are_what_raw_has_more():
    cells = [cell("raw", 0.9, 0.8, view="raw"), cell("size", 0.6, None, view="size")]
    merged = merge_cells(viewed("aligned"), cells, {"history": "no JPEG"})
    assert merged["gaps"]["size"]["auroc"] == pytest.approx(0.3)
    assert merged["gaps"]["size"]["balanced_accuracy"] is None and merged["raw"]["auroc"] == 0.9
    assert merged["failed"] == [{"name": "history", "message": "no JPEG"}]
    text = format_result(merged)
    row = next(line for line in text.splitlines() if line.startswith("| size"))
    assert [part.strip() for part in row.split("|")][2:6] == ["0.6000", "-", "-", "0.3000"]
    assert "failed: history: no JPEG" in text
    without_raw = merge_cells(viewed("aligned"), cells[1:], {"raw": "broken"})
    assert without_raw["raw"] is None and without_raw["gaps"]["size"]["auroc"] is None
    json.dumps(without_raw, allow_nan=False)
    assert "could not be read" not in text
    merged["cells"][0]["counts"]["unreadable"] = 3
    assert "3 of the originals could not be read" in format_result(merged)


def test_curves_are_by_operation_and_genimages_six_have_a_mean():
    cells = [
        cell("raw", 0.9, 0.8),
        cell("jpeg-95", 0.85, 0.7, operation="jpeg", severity=95.0),
        cell("jpeg-30", 0.6, 0.55, operation="jpeg", severity=30.0),
        cell("chain-2", 0.7, 0.6, operation="chain", severity=2),
        cell("LR64", 0.5, 0.5, operation="short_side", severity=64.0, genimage=True),
        cell("blur3", 0.8, 0.6, operation="blur", severity=3.0, genimage=True),
    ]
    merged = merge_cells(viewed("robustness", chains=[2]), cells, {})
    assert {name: [p["severity"] for p in curve] for name, curve in merged["curves"].items()} == {
        "jpeg": [95.0, 30.0],
        "chain": [2],
    }
    assert merged["curves"]["jpeg"][1]["drop"]["auroc"] == pytest.approx(0.3)
    assert merged["genimage"]["mean"]["balanced_accuracy"] == pytest.approx(0.55)
    text = format_result(merged)
    assert "mean of GenImage's six" in text and "failed" not in text


def one_against_nature(*aurocs):
    return {
        name: {"auroc": value, "balanced_accuracy": value, "accuracy": value}
        for name, value in zip(NAMES[1:], aurocs, strict=True)
    }


def test_the_matrix_has_trainings_as_rows_and_the_means_are_of_seen_and_unseen():
    cells = [
        cell("adm", 0, 0, one_against_nature(0.9, 0.6, 0.5), train=["adm"]),
        cell("vqdm", 0, 0, one_against_nature(0.4, 0.7, 0.8), train=["vqdm"]),
    ]
    merged = merge_cells(trained("cross_generator"), cells, {})
    assert merged["matrix"]["train"] == ["adm", "vqdm"] and merged["matrix"]["test"] == list(NAMES[1:])
    assert merged["matrix"]["auroc"] == [[0.9, 0.6, 0.5], [0.4, 0.7, 0.8]]
    assert merged["summary"]["auroc"]["seen"] == pytest.approx((0.9 + 0.8) / 2)
    assert merged["summary"]["auroc"]["unseen"] == pytest.approx((0.6 + 0.5 + 0.4 + 0.7) / 4)
    assert "| adm" in format_result(merged)


def test_leave_one_out_reads_the_held_out_column():
    cells = [
        cell(
            "without_adm", 0, 0, one_against_nature(0.55, 0.9, 0.9), train=["glide", "vqdm"], held_out="adm"
        ),
        cell(
            "without_vqdm", 0, 0, one_against_nature(0.9, 0.9, 0.7), train=["adm", "glide"], held_out="vqdm"
        ),
    ]
    summary = merge_cells(trained("leave_one_out"), cells, {})["summary"]["auroc"]
    assert summary["held_out"] == {"adm": 0.55, "vqdm": 0.7}
    assert summary["mean"] == pytest.approx(0.625) and summary["worst"] == 0.55
    assert (
        merge_cells(trained("leave_one_out"), [], {"without_adm": "x"})["summary"]["auroc"]["worst"] is None
    )
