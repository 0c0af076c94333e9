"""A new metric is one file: it then has intervals, means, comparisons, a report and text rows."""

from dataclasses import replace
from importlib import invalidate_caches
from pathlib import Path

import pytest

from engines.evaluate import sections
from engines.evaluate.compare import Side, compare, format_comparison
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.metrics_text import format_metrics
from engines.evaluate.predictions import build_table
from engines.evaluate.sections import registry
from engines.report.page import Context, write_report
from tests.random_predictions import CALIBRATION, random_arrays

FILE = '''
"""The share of images of which the detector is certain."""

from engines.evaluate.columns import Labels
from engines.evaluate.sections.base import NO_IMAGES, Metric, MetricSection, Resampled, SectionValues, Show
from engines.stats.scores import Bools


def _certain(labels: Labels) -> Bools:
    return (labels.p_fake < 0.05) | (labels.p_fake > 0.95)


def _overall(section: SectionValues, labels: Labels) -> None:
    section.share("certain_share", _certain(labels), NO_IMAGES)


def _per_generator(section: SectionValues, labels: Labels, index: int) -> None:
    section.share("certain_share", _certain(labels)[labels.generator == index], NO_IMAGES)


SECTION = MetricSection(
    place=45,
    overall=_overall,
    per_generator=_per_generator,
    metrics=(
        Metric(
            key="certain_share",
            resampled=Resampled(place=300, values=lambda labels: (_certain(labels), None), each=True),
            averaged=True,
            compared=Show("certain", 100),
            by_generator=True,
            card=Show("certain of", 60),
            column=Show("certain", 100),
            row=Show("certain", 110),
            generator_column=Show("certain", 60),
        ),
    ),
)
'''


def _forget() -> None:
    registry.all_sections.cache_clear()
    registry.all_metrics.cache_clear()
    invalidate_caches()


@pytest.fixture
def new_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "certain.py").write_text(FILE)
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(folder)])
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def test_one_file_makes_a_metric(new_metric: None, tmp_path: Path) -> None:
    checkpoint = {"checkpoint": "best.pt", "step": 1, "layout": "genimage"}
    arrays = replace(random_arrays(300, 1), checkpoint=checkpoint)
    table = build_table(arrays)
    metrics = compute_metrics(table, resamples=50)
    p = table["p_fake"].to_numpy()
    value = float(((p < 0.05) | (p > 0.95)).mean())
    assert metrics["overall"]["certain_share"] == pytest.approx(value)
    low, high = metrics["intervals"]["images"]["overall"]["certain_share"]
    assert low < value < high
    assert "adm" in metrics["intervals"]["images"]["per_generator"]
    assert metrics["over_generators"]["certain_share"]["n"] == 8
    assert metrics["intervals"]["generators"]["certain_share"] is not None
    text = format_metrics(metrics)
    assert f"{100 * value:.2f} %" in text and text.count("certain") == 2
    other = build_table(
        replace(arrays, generator_probability=arrays.generator_probability[:, [0, *range(8, 0, -1)]])
    )
    comparison = compare(Side("a", table), Side("b", other), resamples=20)
    assert comparison["overall"]["certain_share"]["difference"] == pytest.approx(0)
    assert "certain, by generator" in format_comparison(comparison)
    page = write_report(tmp_path, table, metrics, Context(data="shards", split="test")).read_text()
    assert "certain of" in page and '<button type="button">certain</button>' in page


def test_every_key_is_documented(repo_root: Path) -> None:
    text = (repo_root / "docs" / "metrics.md").read_text()
    arrays = replace(random_arrays(50, 1), checkpoint={"calibration": CALIBRATION})
    overall = compute_metrics(build_table(arrays), resamples=10)["overall"]
    # The page writes `object_error`, "also with `_nature` and `_fake`".
    keys = {key.removesuffix("_nature").removesuffix("_fake") if "object" in key else key for key in overall}
    assert len(keys) > 20
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_without_the_file_there_is_no_metric() -> None:
    metrics = compute_metrics(build_table(random_arrays(50, 1)), resamples=10)
    assert "certain_share" not in metrics["overall"] and "certain" not in format_metrics(metrics)
