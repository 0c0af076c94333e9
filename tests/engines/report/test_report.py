"""The report: one page without a network, everything of the metrics on it, and its parts that move."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from dataio.core.errors import UserError
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.predictions import PredictionArrays, build_table
from engines.report.page import Context, write_report
from engines.report.plots import reliability_figure
from engines.report.report import _run_of, faithfulness_sentence, read_benchmarks, read_protocol

GENERATORS = ("nature", "adm", "<script>alert(1)</script>")
CALIBRATION = {
    "temperature": 1.5,
    "shift": 0.2,
    "threshold": 0.7,
    "unsure": [0.4, 0.7],
    "false_alarm_rate": 0.01,
}


def table(count=120, *, fakes=True, calibrated=False):
    rng = np.random.default_rng(1)
    generator = np.arange(count) % (3 if fakes else 1)
    scores = rng.normal(size=(count, 3)) + 2 * np.eye(3)[generator]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return build_table(
        PredictionArrays(
            sample_id=np.arange(count),
            key=[f"{n:09d}" for n in range(count)],
            generator=generator,
            object=np.arange(count) % 7 - 1,
            generator_probability=p,
            object_top5=np.tile(np.arange(5), (count, 1)),
            generators=GENERATORS,
            objects=[f"object {n}" for n in range(6)],
            checkpoint={
                "checkpoint": "best.pt",
                "step": 3,
                "layout": "manifest",
                **({"calibration": CALIBRATION} if calibrated else {}),
            },
        )
    )


def write(folder, predictions, **more):
    metrics = compute_metrics(predictions, resamples=50)
    path = write_report(folder, predictions, metrics, Context(data="data/set", split="test", **more))
    return metrics, path.read_text(), (folder / "report.md").read_text()


def point(severity, auroc):
    return {"severity": severity, "auroc": auroc, "balanced_accuracy": 0.7}


PROTOCOLS = [
    {
        "protocol": "cross_generator",
        "matrix": {"train": ["adm"], "test": ["adm", "glide"], "auroc": [[0.9, None]]},
    },
    {
        "protocol": "robustness",
        "raw": {"auroc": 0.95, "balanced_accuracy": 0.9},
        "curves": {"jpeg": [point(90, 0.9), point(50, 0.6)]},
        "genimage": {"LR112": {"auroc": 0.8, "balanced_accuracy": None}},
    },
    {
        "protocol": "aligned",
        "raw": {"auroc": 0.95, "balanced_accuracy": 0.9},
        "cells": [{"name": "same_jpeg", "metrics": {"auroc": 0.7, "balanced_accuracy": 0.6}}],
        "gaps": {"same_jpeg": {"auroc": 0.25}},
    },
]


def test_the_page_needs_no_network_and_shows_the_figures_of_the_metrics(tmp_path):
    metrics, page, card = write(tmp_path, table())
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", page)
    assert not re.search(r"@import|url\((?!#)", page)
    for text in (page, card):
        assert f"{100 * metrics['overall']['real_fake_error']:.2f} %" in text
        low, high = metrics["intervals"]["images"]["overall"]["auroc"]
        assert f"{low:.4f} to {high:.4f}" in text
        assert "No threshold was frozen" in text
        assert "not audited" in text
    assert "<script>alert" not in page
    assert page.count("<svg ") == 3
    assert "currentColor" in page
    assert "#010203" not in page


def test_calibration_audit_protocols_and_pictures_are_shown_where_they_are(tmp_path):
    picture = {
        "key": "000000001",
        "generator": "adm",
        "generator_pred": "nature",
        "p_fake": 0.2,
        "outcome": "wrong",
        "image": "data:image/png;base64,AAAA",
        "heat": "",
        "overlay": "",
    }
    audit = {"verdict": "fail", "reasons": ["format: AUC 1.000 (0.990 to 1.000)"]}
    _, page, card = write(
        tmp_path, table(calibrated=True), audit=audit, protocols=PROTOCOLS, pictures=[picture]
    )
    assert "frozen on validation images for a false-alarm rate of 1.00 %" in page
    assert "real/fake error at the frozen threshold" in card
    for text in (page, card):
        assert "format: AUC 1.000 (0.990 to 1.000)" in text
    for words in ("Cross generator", "jpeg 90", "GenImage: LR112", "same_jpeg", "0.2500", "000000001"):
        assert words in page, words


def test_the_explainer_s_answers_are_shown_and_an_unanswered_benchmark_is_an_error(tmp_path):
    run = tmp_path / "explainer"
    with pytest.raises(UserError, match="no answered benchmark"):
        read_benchmarks(run)
    (run / "vqa" / "true_false").mkdir(parents=True)
    metrics = {"schema": "telltale-vqa-metrics", "items": 40, "error": 0.275, "unparsed": 3}
    metrics |= {"error_interval_95": [0.16, 0.43], "chance_error": 0.5, "blind": {"a": 0.5, "b": 0.4}}
    file = run / "vqa" / "true_false" / "metrics.json"
    file.write_text(json.dumps(metrics))
    _, page, card = write(tmp_path, table(), benchmarks=read_benchmarks(run))
    for text in (page, card):
        for figure in ("true false", "27.50 %", "16.00 % to 43.00 %", "50.00 %", "40.00 %"):
            assert figure in text, figure
    file.write_text('{"schema": "other"}')
    with pytest.raises(UserError, match="not a benchmark's metrics"):
        read_benchmarks(run)


def test_a_split_without_fakes_has_a_page_that_says_so(tmp_path):
    _, page, _ = write(tmp_path, table(20, fakes=False))
    assert "No curves: no images of any generator" in page


def test_a_page_too_large_and_a_folder_that_is_a_file_are_refused(tmp_path):
    huge = {"key": "1", "generator": "adm", "generator_pred": "adm", "p_fake": 1.0, "outcome": "right"}
    huge |= {"image": "data:," + "A" * 16_000_000, "heat": "", "overlay": ""}
    with pytest.raises(UserError, match="more than 15; ask for fewer pictures"):
        write(tmp_path, table(), pictures=[huge])
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file", table())


def test_a_folder_without_a_protocol_is_named(tmp_path):
    with pytest.raises(UserError, match=r"protocol\.json: not found"):
        read_protocol(tmp_path)
    (tmp_path / "protocol.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError, match="not a protocol's result"):
        read_protocol(tmp_path)


def test_maps_are_trusted_only_where_both_intervals_say_so():
    def found(deletion, insertion):
        each = {"map": 0.5, "random": 0.6, "difference": -0.1}
        return {
            "images": 9,
            "deletion": {**each, "interval": deletion},
            "insertion": {**each, "interval": insertion},
        }

    assert "Both support" in faithfulness_sentence(found([-0.2, -0.1], [0.1, 0.2]))
    assert "Only one" in faithfulness_sentence(found([-0.2, -0.1], [-0.1, 0.2]))
    assert "Neither" in faithfulness_sentence(found([0.1, 0.2], [-0.2, -0.1]))
    assert "Not measured: no images" in faithfulness_sentence({"deletion": None, "reason": "no images"})


USED = """
<script>
addEventListener("error", event => { document.title = "error: " + event.message; });
const heading = [...document.querySelectorAll("#by-generator th button")].find(b => b.textContent === "images");
heading.click(); heading.click();
const slider = document.getElementById("slider");
slider.value = "0"; slider.dispatchEvent(new Event("input"));
</script>
"""


def test_in_a_browser_the_table_sorts_and_the_threshold_moves(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a browser: apt install chromium")
    predictions = table(100)
    _, page, _ = write(tmp_path, predictions)
    (tmp_path / "used.html").write_text(page.replace("</body>", USED + "</body>"))
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"),
            f"file://{tmp_path / 'used.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    assert "<title>Evaluation:" in done.stdout
    assert done.stdout.count('aria-sort="descending"') == 1
    rows = re.findall(r'<tr><th scope="row">[^<]*</th><td data-value="(\d+)"', done.stdout)
    assert rows == sorted(rows, key=int, reverse=True)
    assert len(rows) == 3
    # From P(fake) >= 0 on, everything is called fake.
    assert re.search(r"<output[^>]*>0\.000</output>", done.stdout)
    assert done.stdout.count("<td>100.00 %</td>") == 3
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert sum(sum(one["counts"]) for one in data["generators"]) == predictions.num_rows


def test_the_title_names_the_run(tmp_path):
    _, page, card = write(tmp_path, table(), run="quickstart")
    assert "<title>Evaluation: quickstart, best.pt on data/set, test</title>" in page
    assert card.startswith("# quickstart, best.pt on data/set, test split")
    (tmp_path / "quickstart").mkdir()
    for given in ("best.pt", ".", "checkpoints/step_3.pt"):
        assert _run_of(str(tmp_path / "quickstart" / given)) == "quickstart"


def test_points_at_0_and_1_are_whole(tmp_path):
    fake = np.arange(200) % 2 == 1
    figure = reliability_figure(fake, {"as trained": np.where(fake, 1.0, 0.0)})
    box = re.search(r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"/>\s*</clipPath>', figure)
    assert box is not None
    left, top, width, height = map(float, box.groups())
    points = re.findall(r'<path d="([^"]*)" clip-path[^>]*fill: #1f77b4', figure)
    assert len(points) == 2
    for point in points:
        x, y = np.array(re.findall(r"[\d.]+", point), float).reshape(-1, 2).T
        assert left < x.min() and x.max() < left + width and top < y.min() and y.max() < top + height
