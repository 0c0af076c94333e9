"""Comparing two detectors: paired figures against plain restatements, and the sentence."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from dataio.core.errors import UserError
from engines.evaluate.compare import Side, compare, format_comparison
from engines.evaluate.metrics import compute_metrics
from engines.evaluate.predictions import build_table, write_predictions
from tests.random_predictions import CALIBRATION, GENIMAGE, random_arrays


def blurred(arrays: Any, share: float, seed: int = 0, **changes: Any) -> Any:
    """The same images, predicted worse: `share` of each probability is random."""
    noise = np.random.default_rng(seed).dirichlet(np.ones(len(arrays.generators)), len(arrays.key))
    mixed = (1 - share) * arrays.generator_probability + share * noise
    return replace(arrays, generator_probability=mixed, **changes)


def _compared(a: Any, b: Any, **options: Any) -> dict[str, Any]:
    found = compare(Side("one", build_table(a)), Side("two", build_table(b)), **{"resamples": 200, **options})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert max(map(len, format_comparison(found).split("\n\n")[1].splitlines())) <= 100
    return found


def exact_mcnemar(a: int, b: int) -> float:
    """Twice the binomial's tail, at most 1."""
    return min(1.0, 2 * binom.cdf(min(a, b), a + b, 0.5)) if a + b else 1.0


def test_figures_are_those_of_metrics_json_and_their_difference() -> None:
    a = replace(random_arrays(400, 1), checkpoint={"calibration": CALIBRATION})
    b = blurred(a, 0.6, checkpoint={"calibration": {**CALIBRATION, "threshold": 0.6, "unsure": [0.5, 0.6]}})
    found = _compared(a, b)
    one, two = (compute_metrics(build_table(arrays), resamples=2) for arrays in (a, b))
    parts = [(found["overall"], one["overall"], two["overall"])]
    parts += [(found["per_generator"][g], one["per_generator"][g], two["per_generator"][g]) for g in GENIMAGE]
    for figures, first, second in parts:
        for key, figure in figures.items():
            if key == "n":
                continue
            assert figure["a"] == pytest.approx(first[key], abs=1e-9)
            assert figure["b"] == pytest.approx(second[key], abs=1e-9)
            assert figure["difference"] == pytest.approx(first[key] - second[key], abs=1e-9)
    assert found["reasons"].keys() & {"overall.real_fake_error_calibrated", "sentence"} == set()
    assert "frozen threshold" in found["sentence"]


def test_mcnemar_counts_the_images_that_only_one_gets_wrong() -> None:
    a = random_arrays(400, 2)
    b = blurred(a, 0.7)
    found, fake = _compared(a, b), a.generator != 0
    wrong = [(x.generator_probability[:, 1:].sum(1) >= 0.5) != fake for x in (a, b)]
    for figures, rows in (
        (found["overall"], np.ones(400, bool)),
        (found["per_generator"]["nature"], ~fake),
        (found["per_generator"]["vqdm"], a.generator == 7),
    ):
        test = figures["real_fake_error"]["mcnemar"]
        assert test["only_a_wrong"] == (wrong[0] & ~wrong[1] & rows).sum()
        assert test["only_b_wrong"] == (wrong[1] & ~wrong[0] & rows).sum()
        assert test["p"] == pytest.approx(exact_mcnemar(test["only_a_wrong"], test["only_b_wrong"]))


def test_paired_intervals_are_narrower_than_the_two_apart() -> None:
    a = random_arrays(400, 3)
    b = blurred(a, 0.1)
    found = _compared(a, b, resamples=400)["overall"]["generator_error"]
    intervals = compute_metrics(build_table(a), resamples=400)["intervals"]["images"]["overall"]
    low, high = intervals["generator_error"]
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert found["interval"][1] - found["interval"][0] < 0.7 * (high - low)
    # In closed form: the standard deviation of the mean of -1, 0 and 1.
    test = found["mcnemar"]
    share = (test["only_a_wrong"] + test["only_b_wrong"]) / 400
    expected = 2 * 1.96 * np.sqrt((share - found["difference"] ** 2) / 400)
    assert found["interval"][1] - found["interval"][0] == pytest.approx(expected, rel=0.2)


def test_the_sentence_names_the_better_one_whichever_side_it_is_on() -> None:
    a = random_arrays(400, 4)
    b = blurred(a, 0.9)
    there, back = _compared(a, b), _compared(b, a)
    for found, better, worse in ((there, "one", "two"), (back, "two", "one")):
        sentence = found["sentences"]["generator_error"]
        assert sentence.startswith(f"{better} errs less than {worse} on 400 images, naming the generator")
        low, high = sorted(abs(100 * x) for x in found["overall"]["generator_error"]["interval"])
        assert f"95 % interval {low:.2f} to {high:.2f}" in sentence
        assert "McNemar p = " in sentence
    assert found["sentence"] == found["sentences"]["real_fake_error"]


def test_like_detectors_do_not_differ_significantly() -> None:
    a = random_arrays(300, 5)
    found = _compared(a, blurred(a, 0.02))
    assert "do not differ significantly" in found["sentences"]["real_fake_error"]
    same = _compared(a, a)
    assert same["overall"]["auroc"]["difference"] == 0
    assert same["overall"]["real_fake_error"]["mcnemar"]["p"] == 1.0
    assert same["overall"]["real_fake_error"]["interval"] is None
    assert "overall.real_fake_error.interval" in same["reasons"]
    assert "not differ significantly" in same["sentence"] and "no interval" in same["sentence"]


def test_groups_decide_where_the_images_are_not_independent() -> None:
    """One lucky group of 60 images convinces McNemar's test but not the interval over groups."""
    a = random_arrays(300, 6)
    a = replace(a, group=["lucky" if i < 60 else f"g{i // 30}" for i in range(300)])
    p = a.generator_probability.copy()
    wrong = np.where(a.generator[:60] == 1, 2, 1)
    p[:60] = np.eye(9)[wrong]
    found = _compared(a, replace(a, generator_probability=p))
    assert found["resampled"] == "groups" and found["groups"] == 9
    figure = found["overall"]["generator_error"]
    assert figure["mcnemar"]["p"] < 1e-6 and figure["interval"][1] == 0.0
    assert "not differ significantly" in found["sentences"]["generator_error"]


def test_one_side_without_calibration() -> None:
    a = replace(random_arrays(100, 7), checkpoint={"calibration": CALIBRATION})
    found = _compared(a, blurred(a, 0.2, checkpoint={}))
    assert found["overall"]["real_fake_error_calibrated"] is None
    assert found["reasons"]["overall.real_fake_error_calibrated"] == "no calibration"
    assert "P(fake) >= 0.5" in found["sentence"]


def test_label_spaces_in_another_order_are_the_same_images() -> None:
    a = random_arrays(200, 8)
    order = np.array([0, 8, 7, 6, 5, 4, 3, 2, 1])
    b = replace(
        a,
        generators=[GENIMAGE[i] for i in order],
        generator=np.argsort(order)[a.generator],
        generator_probability=a.generator_probability[:, order],
    )
    for figure in _compared(a, b)["overall"].values():
        assert figure is None or figure["difference"] == pytest.approx(0, abs=1e-12)


def test_odd_tables_have_reasons() -> None:
    none = random_arrays(1, 9)
    found = _compared(none, blurred(none, 0.5))
    assert found["overall"]["auroc"] is None and "overall.auroc" in found["reasons"]
    assert found["sentence"] is None and found["reasons"]["sentence"].startswith("no images of ")
    assert "real against fake is not compared: no images of" in format_comparison(found)
    assert found["overall"]["generator_error"]["difference"] == 0
    empty = build_table(random_arrays(5, 1)).slice(0, 0)
    found = compare(Side("a", empty), Side("b", empty), resamples=10)
    assert found["sentence"] is None and found["reasons"]["sentence"] == "no images"
    assert format_comparison(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.slice(1), ["1 samples in only one", "such as 0"]),
        (lambda t: build_table(random_arrays(50, 99)), ["has generator"]),
        (lambda t: t.set_column(1, "key", [["x"] * 50]), ["sample 0 has key 'x', not '0'"]),
    ],
)
def test_other_images_are_one_line(change: Any, words: list[str]) -> None:
    table = build_table(random_arrays(50, 10))
    with pytest.raises(UserError) as caught:
        compare(Side("one", table), Side("two", change(table)))
    message = str(caught.value)
    assert message.startswith("two: predictions of other images than one has") and "\n" not in message
    for word in words:
        assert word in message


def _run(root: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "launch" / "compare.py"), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_command_takes_folders_and_files(tmp_path: Path, repo_root: Path) -> None:
    a = replace(random_arrays(120, 11), identity=[f"{i:032x}" for i in range(120)])
    (tmp_path / "a").mkdir()
    write_predictions(tmp_path / "a" / "predictions.parquet", build_table(a))
    write_predictions(tmp_path / "b.parquet", build_table(blurred(a, 0.9)))
    done = _run(repo_root, tmp_path, "a", "b.parquet", "--output", "c.json", "--resamples", "100")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["schema"], found["version"]) == ("telltale-comparison", 1)
    assert found["sentence"] in done.stdout and "results: c.json" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a", "missing"], ["missing: not found"]),
        (["a"], ["b"]),
        (["a", "a", "--output", "nowhere/c.json"], ["--output nowhere/c.json"]),
        (["a", "a", "--resamples", "0"], ["--resamples is 0"]),
        (["a", "damaged"], ["damaged/predictions.parquet: not a readable Parquet file"]),
        (["a", "other"], ["other: predictions of other images"]),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, repo_root: Path, flags: list[str], words: list[str]
) -> None:
    for name, count in (("a", 20), ("other", 21)):
        (tmp_path / name).mkdir()
        write_predictions(tmp_path / name / "predictions.parquet", build_table(random_arrays(count, 1)))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "predictions.parquet").write_bytes(b"PAR1")
    done = _run(repo_root, tmp_path, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.rglob("*.json"))
