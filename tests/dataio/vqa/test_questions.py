"""Benchmarks that cannot be guessed, conversations that do not leak into them."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dataio.core.errors import UserError
from dataio.vqa.blind_baselines import (
    baselines_above_chance,
    blind_scores,
    kind_of,
    label_in_text,
    options_of,
)
from dataio.vqa.conversations import check_images, read_conversations
from dataio.vqa.questions import (
    VqaSizes,
    images_of_manifest,
    images_of_shards,
    refuse_if_guessable,
    write_vqa,
)

OBJECTS = ("cat", "goldfish", "electric guitar", "owl", "umbrella")
PLAN = VqaSizes(train=40, val=8, true_false=24, multiple_choice=24, seed=1)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A manifest of 800 distinct little pictures, grouped by threes."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(800):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        generator = ("nature", "nature", "adm", "glide")[number % 4]
        rows.append([f"{number}.png", generator, OBJECTS[number % 5], f"g{number // 3}"])
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "generator", "object", "group"], *rows])
    return folder / "list.csv"


@pytest.fixture(scope="module")
def made(labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    summary = write_vqa(images_of_manifest(labelled), folder, PLAN)
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in summary["counts"]}
    return folder, summary, files


def test_everything_is_balanced(made):
    _, summary, files = made
    assert summary["counts"] == {"conversations": 40, "val": 8, "true_false": 24, "multiple_choice": 24}
    for items in files.values():
        generators = Counter(item["metadata"]["generator"] for item in items)
        assert generators["natural"] == len(items) // 2
        assert abs(generators["adm"] - generators["glide"]) <= 1
    letters = Counter(item["ground_truth"] for item in files["multiple_choice"])
    assert letters == {"A": 6, "B": 6, "C": 6, "D": 6}
    wordings = Counter((item["question"], item["ground_truth"]) for item in files["true_false"])
    assert len({question for question, _ in wordings}) == 4
    assert set(wordings.values()) == {3}


def test_no_blind_rule_beats_chance(made):
    _, summary, files = made
    for kind in ("true_false", "multiple_choice"):
        assert kind_of(files[kind][0]) == kind
        assert baselines_above_chance(files[kind]) == []
        assert summary["blind"][kind] == blind_scores(files[kind])
    assert abs(summary["blind"]["multiple_choice"]["longest_option"] - 0.25) < 0.1
    assert summary["blind"]["true_false"] == {"always_fake": 0.5, "always_real": 0.5, "by_wording": 0.5}


def test_options_are_both_verdicts_of_two_objects_and_one_is_right(made):
    for item in made[2]["multiple_choice"]:
        options = options_of(item)
        assert sorted(label_in_text(text) for text in options.values()) == ["Fake", "Fake", "Real", "Real"]
        fake = item["metadata"]["generator"] != "natural"
        right = options[item["ground_truth"]]
        assert label_in_text(right) == ("Fake" if fake else "Real")
        assert item["metadata"]["object_category"] in right
        assert len({text.partition(" photograph")[2] for text in options.values()}) == 2


def test_benchmarks_share_neither_images_nor_groups_with_training(made, labelled):
    folder, _, files = made
    with open(labelled) as file:
        groups = {row["path"]: row["group"] for row in csv.DictReader(file)}

    def of(names):
        images = {(folder / item["image"]).resolve().name for name in names for item in files[name]}
        return images, {groups[image] for image in images}

    train, held = of(["conversations", "val"]), of(["true_false", "multiple_choice"])
    assert not train[0] & held[0]
    assert not train[1] & held[1]


def test_copies_under_another_name_are_left_out(labelled, tmp_path):
    images = images_of_manifest(labelled)
    real = sum(not image.fake for image in images["train"])
    whole = 2 * min(real, len(images["train"]) - real)
    copied = dict(images, test=[*images["test"], *images["train"][:50]])
    summary = write_vqa(
        copied, tmp_path / "all", VqaSizes(train=whole, val=0, true_false=6, multiple_choice=0)
    )
    assert 40 <= summary["left_out_of_test"] <= 50


def test_conversations_are_read_and_say_the_verdict_first(made):
    folder, _, files = made
    found, rejected = read_conversations(folder / "conversations.json", markers=("<|endoftext|>",))
    assert (len(found), rejected) == (40, [])
    assert check_images(found)[1] == []
    kinds = Counter(item["id"].partition("-")[0] for item in files["conversations"])
    assert max(kinds.values()) - min(kinds.values()) <= 1
    for item in files["conversations"]:
        truth = "Real" if item["metadata"]["generator"] == "natural" else "Fake"
        answer = item["conversations"][1]["value"]
        if item["id"].startswith("explain"):
            assert answer.startswith(f"This is a {truth.lower()} image.")
            assert item["metadata"]["object_category"] in answer
        elif item["id"].startswith("short"):
            assert answer == truth
    assert len({item["conversations"][0]["value"] for item in files["conversations"]}) > 10


def test_the_seed_decides(labelled, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_vqa(
            images_of_manifest(labelled),
            tmp_path / name,
            VqaSizes(train=20, val=4, true_false=8, multiple_choice=8, seed=seed),
        )
    texts = [(tmp_path / name / "conversations.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_shards_serve_as_well(tiny_shards, tmp_path):
    images = {split: images_of_shards(tiny_shards, split) for split in ("train", "val", "test")}
    write_vqa(images, tmp_path / "out", VqaSizes(train=20, val=0, true_false=6, multiple_choice=0))
    found, _ = read_conversations(tmp_path / "out" / "conversations.json")
    assert check_images(found)[1] == []
    assert found[0].image is not None and ".tar/" in found[0].image


def test_too_few_images_and_odd_numbers_are_refused_and_nothing_is_written(labelled, tmp_path):
    images = images_of_manifest(labelled)
    with pytest.raises(UserError, match="need 500 real and 500 fake images, it has"):
        write_vqa(images, tmp_path / "out", VqaSizes(train=1000))
    with pytest.raises(UserError, match="expected an even number"):
        write_vqa(images, tmp_path / "out", VqaSizes(train=21, val=0))
    one = {split: [i for i in found if i.object == "cat"] for split, found in images.items()}
    with pytest.raises(UserError, match="at least two objects"):
        write_vqa(one, tmp_path / "out", VqaSizes(train=2, val=0, true_false=0, multiple_choice=2))
    assert not (tmp_path / "out").exists()


def choice(number, truth, lengths):
    texts = [f"A {'real' if place % 2 else 'fake'} {'x' * length}." for place, length in enumerate(lengths)]
    question = "What?\n" + "\n".join(f"{letter}: {text}" for letter, text in zip("ABCD", texts, strict=True))
    return {"id": str(number), "question": question, "ground_truth": truth}


@pytest.mark.parametrize(
    ("items", "rule"),
    [
        (
            [choice(n, "ABCD"[n % 4], [20 if m == n % 4 else 5 for m in range(4)]) for n in range(40)],
            "longest_option",
        ),
        ([choice(n, "A", [5, 5, 5, 5]) for n in range(40)], "most_common_letter"),
        ([choice(n, "AC"[n % 2], [5, 5, 5, 5]) for n in range(40)], "always_fake"),
        (
            [
                {"id": str(n), "question": "Real?", "ground_truth": "Fake" if n < 30 else "Real"}
                for n in range(40)
            ],
            "always_fake",
        ),
        (
            [
                {"id": str(n), "question": "ab"[n % 2], "ground_truth": ("Fake", "Real")[n % 2]}
                for n in range(40)
            ],
            "by_wording",
        ),
    ],
    ids=["longest", "letter", "fake options", "fakes", "wording"],
)
def test_a_benchmark_that_a_rule_beats_is_refused(items, rule):
    assert rule in [name for name, *_ in baselines_above_chance(items)]
    with pytest.raises(UserError, match=f"image-blind baseline beats chance .*{rule}"):
        refuse_if_guessable("benchmark", items)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("This is a fake image. Real cameras differ.", "Fake"),
        ("Real", "Real"),
        ("It is not real.", "Fake"),
        ("The image is not artificially generated.", "Real"),
        ("I cannot tell whether it is real or fake.", ""),
        ("A dog on a lawn. It looks AI-generated.", "Fake"),
        ("D", ""),
        ("", ""),
        ("It has a real-world look.", ""),
    ],
)
def test_verdicts_in_words(text, verdict):
    assert label_in_text(text) == verdict


def test_the_reference_benchmark_is_gameable(shared_data):
    items = json.loads((shared_data / "vqa" / "multiple_choice" / "questions.json").read_text())
    scores = blind_scores(items)
    assert scores["longest_option"] == 0.81
    assert "longest_option" in [name for name, *_ in baselines_above_chance(items)]


def test_a_manifest_s_faults_are_named_by_the_flag_that_gave_it(tmp_path):
    with pytest.raises(UserError, match=r"^manifest .*none\.csv: no such CSV file"):
        images_of_manifest(tmp_path / "none.csv")
    (tmp_path / "list.csv").write_text("path,generator,object\nnone.png,nature,cat\n")
    with pytest.raises(
        UserError, match=r"^manifest .*none\.png \(line 2\)\. Give root, or remove their lines"
    ):
        images_of_manifest(tmp_path / "list.csv")
