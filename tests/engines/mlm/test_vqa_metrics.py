"""Scores of answers: the reference's published figures, and what each kind of answer counts."""

import json

import pytest
from scipy.stats import binomtest

from dataio.core.errors import UserError
from dataio.vqa.conversations import Rejected
from engines.config.mlm import FinetuneConfig
from engines.config.parser import parse_as
from engines.mlm.prepare_data import report_rejected
from engines.mlm.vqa_answers import read_items
from engines.mlm.vqa_metrics import compute_vqa_metrics, parse_answer, vqa_summary
from engines.runtime.paths import CONFIGS
from launch.evaluate_mlm import main

PUBLISHED = {
    "base_tinyllava": 38,
    **{
        f"finetuned_tinyllava_{n}": e for n, e in enumerate([38, 32, 32, 30, 26, 24, 36, 40, 50, 48], start=1)
    },
}


@pytest.mark.parametrize(("name", "error"), PUBLISHED.items(), ids=PUBLISHED.keys())
def test_the_references_true_false_errors(shared_data, name, error):
    file = shared_data / "vqa" / "reference_answers" / f"vqa_true_false_benchmark_{name}.json"
    metrics = compute_vqa_metrics(read_items(file))
    assert metrics["error"] == error / 100
    assert (metrics["items"], metrics["unparsed"], metrics["chance_error"]) == (50, 0, 0.5)


def test_the_references_multiple_choice(shared_data, capsys, tmp_path):
    folder = shared_data / "vqa" / "reference_answers"
    base = folder / "vqa_multiple_choice_benchmark_base_tinyllava.json"
    tuned = folder / "vqa_multiple_choice_benchmark_finetuned_tinyllava_6.json"
    assert compute_vqa_metrics(read_items(base))["error"] == 0.47
    assert main(["--answers", str(tuned), "--compare", str(base), "--output", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["error"] == 0.38
    assert metrics["blind"]["longest_option"] == pytest.approx(0.19)
    assert (metrics["mcnemar"]["fixed"], metrics["mcnemar"]["broken"]) == (11, 2)
    assert metrics["mcnemar"]["p"] == pytest.approx(0.0225, abs=5e-4)
    assert set(metrics["defective"]) == {"LUrHqwTCuBewTLK83nR4ax", "8LFozqHJ3VYeDaDaiRK2sW"}
    items = [item for item in read_items(tuned) if item["id"] not in metrics["defective"]]
    wrong = sum(item["answer"] != item["ground_truth"] for item in items)
    assert metrics["error_excluding_defective"] == pytest.approx(wrong / 98)
    assert metrics["verdict"]["error"] == 0.30
    assert metrics["per_generator"]["big gan"]["items"] == 15
    text = capsys.readouterr().out
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    assert ["longest_option", "19.00%", "BEATS THE MODEL"] in lines
    assert "p = 0.022" in text


def item(number, truth, answer, **more):
    return {
        "id": str(number),
        "question": more.pop("question", "Real?"),
        "ground_truth": truth,
        "answer": answer,
        **more,
    }


QUESTION = "Which?\nA: A real cat.\nB: A fake cat.\nC: A fake owl.\nD: A real owl.\nAnswer."


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(C) because", "C"),
        ("The answer is D", "D"),
        ("Answer: A", "A"),
        ("Because", "unparsed"),
        ("A cat on a mat.", "unparsed"),
        ("E", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_letters(answer, said):
    assert parse_answer(item(0, "A", answer, question=QUESTION)) == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Fake", "Fake"),
        ("real.", "Real"),
        ("It is not real", "Fake"),
        ("Real or fake", "unparsed"),
        ("Cat", "unparsed"),
    ],
)
def test_verdicts(answer, said):
    assert parse_answer(item(0, "Fake", answer)) == said


def test_unparsed_answers_are_wrong_and_counted():
    answers = ["Fake", "Maybe", "Real", "Real"]
    items = [item(n, "Fake" if n < 2 else "Real", a) for n, a in enumerate(answers)]
    metrics = compute_vqa_metrics(items)
    assert (metrics["error"], metrics["unparsed"]) == (0.25, 1)
    assert metrics["verdict"]["confusion"]["Fake, called unparsed"] == 1
    low, high = metrics["error_interval_95"]
    expected = binomtest(1, 4).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_scores_give_auroc_and_an_error_at_half():
    scores = [0.9, 0.4, 0.6, 0.1]
    items = [item(n, "Fake" if n < 2 else "Real", "Fake", p_fake=p) for n, p in enumerate(scores)]
    verdict = compute_vqa_metrics(items)["verdict"]
    assert verdict["auroc"] == 0.75
    assert verdict["error_at_half"] == 0.5
    assert "AUROC" in vqa_summary(compute_vqa_metrics(items))


def test_open_answers_are_right_by_verdict_and_measured_by_words():
    truth = "This is a fake image. The hand has six fingers."
    items = [
        item(0, truth, truth, metadata={"generator": "adm"}),
        item(1, truth, "This is a real image. Nice cat.", metadata={"generator": "adm"}),
    ]
    metrics = compute_vqa_metrics(items)
    assert (metrics["kind"], metrics["error"], metrics["blind"]) == ("open", 0.5, {})
    # By hand: 1 for the copy; 6 of 8 and 10 words in common order for the other ("This is a image").
    common, said, true = 4, 7, 10
    other = 2 * (common / said) * (common / true) / (common / said + common / true)
    assert metrics["text"]["rouge_l"] == pytest.approx((1 + other) / 2)
    assert metrics["text"]["similarity"] is None
    assert compute_vqa_metrics(items, similarity=lambda a, b: [1.0, 0.5])["text"]["similarity"] == 0.75


def test_mcnemar_needs_the_same_items():
    items = [item(0, "Fake", "Fake"), item(1, "Real", "Fake")]
    other = [item(0, "Fake", "Real"), item(1, "Real", "Fake")]
    assert compute_vqa_metrics(items, other=other)["mcnemar"] == {"fixed": 1, "broken": 0, "p": 1.0}
    with pytest.raises(UserError, match="answers to other items"):
        compute_vqa_metrics(items, other=other[:1])
    with pytest.raises(UserError, match="asks another question"):
        compute_vqa_metrics(items, other=[*other[:1], item(1, "Real", "Fake", question="?")])


def test_files_that_cannot_be_scored(tmp_path):
    file = tmp_path / "a.json"
    for text, said in (
        ("[", "not readable as JSON"),
        ("{}", "expected a list of items"),
        ('[{"id": "1", "question": "?"}]', "item 0 has no text 'ground_truth'"),
        (
            json.dumps([{**item(0, "Fake", "x"), "question": "\ud83d?"}]),
            "item 0 has in its question a lone surrogate",
        ),
        (
            json.dumps([{**item(0, "Fake", "x"), "answer": "a\0"}]),
            "item 0 has in its answer a control character",
        ),
        (
            json.dumps([{**item(0, "Fake", "x"), "metadata": {"generator": "\udc80"}}]),
            "in its generator a lone",
        ),
        (json.dumps([{**item(0, "Fake", "x"), "question": "<image>\u200b"}]), "item 0 has an empty question"),
        (json.dumps([{**item(0, "Fake", "x"), "ground_truth": " "}]), "item 0 has an empty ground_truth"),
        (
            json.dumps([{**item(0, "Fake", "x"), "question": "<image><image> Real?"}]),
            "<image> more than once",
        ),
        (json.dumps([{**item(0, "Fake", "x"), "question": "Real?<|endoftext|>"}]), "template's own marker"),
        (json.dumps([{**item(0, "Fake", "x"), "question": 3}]), "item 0 has no text 'question'"),
        (json.dumps([item(0, "Fake", "")]), "no item has an answer"),
        (json.dumps([item(0, "Fake", "x"), item(1, "A cat.", "x")]), "items of several kinds"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            main(["--answers", str(file)])
    with pytest.raises(UserError, match="no such file"):
        main(["--answers", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="give --model DIR"):
        main(["--model", "x"])


def test_items_with_one_id_are_numbered_and_compared_with_the_same_numbers(tmp_path):
    first = [{**item(0, "Fake", "Fake"), "question": f"Real or fake, {n}?"} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(first))
    items = read_items(tmp_path / "a.json")
    assert [one["id"] for one in items] == ["0", "0#2", "0#3"]
    # What is written again has the numbers already.
    (tmp_path / "b.json").write_text(json.dumps(items))
    assert read_items(tmp_path / "b.json") == items
    other = [{**one, "answer": "Real"} for one in items]
    assert compute_vqa_metrics(items, other=other)["mcnemar"]["fixed"] == 3


def test_rejected_samples_are_listed_whatever_their_names_hold(tmp_path):
    config = parse_as(FinetuneConfig, ["--data.skip_rejected", "true"], CONFIGS / "tinyllava_quickstart.yaml")
    report_rejected([Rejected("a\ud83d", "\udcff.jpg: cannot be read")], config, tmp_path)
    assert (tmp_path / "rejected.csv").read_text().splitlines() == [
        "id,reason",
        r"a\ud83d,\udcff.jpg: cannot be read",
    ]
    config.data.skip_rejected = False
    with pytest.raises(UserError, match=r"1 unusable samples: a\\ud83d: \\udcff\.jpg: cannot be read"):
        report_rejected([Rejected("a\ud83d", "\udcff.jpg: cannot be read")], config, tmp_path)


@pytest.mark.parametrize(("real", "fake"), [("real", "FAKE"), ("Real.", " Fake "), ("Real\u200b", '"Fake"')])
def test_spellings_of_real_and_fake_are_one_kind_of_question(tmp_path, real, fake):
    items = [
        {"id": truth, "image": "x.png", "question": "Real or Fake?", "ground_truth": truth}
        for truth in (real, fake)
    ]
    (tmp_path / "a.json").write_text(json.dumps(items))
    read = read_items(tmp_path / "a.json")
    assert [item["ground_truth"] for item in read] == ["Real", "Fake"]
