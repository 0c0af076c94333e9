"""Asking a model: batches change nothing, and P(fake) is the token's."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataio.core.errors import UserError
from engines.mlm.vqa_answers import Answerer, check_item_images, first_ids
from engines.mlm.vqa_benchmark import answer_benchmark, choose_device, load_for_answers, write_results
from engines.mlm.vqa_metrics import compute_vqa_metrics
from models.tinyllava.checkpoint import load_tinyllava
from models.tinyllava.config import TINY
from models.tinyllava.text import preprocess_image, tokenize_turns

CHOICE = (
    "Which?\nA: A real photograph of a cat.\nB: A fake photograph of a cat.\nAnswer with just the letter."
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    items = []
    for number in range(5):
        Image.effect_noise((40 + number, 30), 60 + 30 * number).convert("RGB").save(folder / f"{number}.png")
        question = "Is this image real or fake? " + "Really? " * number
        items.append(
            {"id": str(number), "image": f"{number}.png", "question": question, "ground_truth": "Fake"}
        )
    (folder / "items.json").write_text(json.dumps(items))
    return folder, items


@pytest.fixture(scope="module")
def answerer():
    model, processor = load_tinyllava(TINY, seed=1)
    with torch.no_grad():
        model.lm_head.bias.normal_(0, 1)
    return Answerer(model, processor, batch=2)


def test_answers_do_not_depend_on_the_batch(asked, answerer):
    folder, items = asked
    places = [str(folder / item["image"]) for item in items]
    questions = [item["question"] for item in items]
    together = answerer.answers(questions, places, 8)
    alone = [answerer.answers([q], [p], 8)[0] for q, p in zip(questions, places, strict=True)]
    assert together == alone
    assert torch.allclose(
        answerer.probabilities(questions, places),
        torch.cat([answerer.probabilities([q], [p]) for q, p in zip(questions, places, strict=True)]),
        atol=1e-6,
    )


@torch.no_grad()
def test_p_fake_is_the_share_of_the_verdicts_tokens(asked, answerer):
    folder, items = asked
    place = str(folder / "0.png")
    model, processor = answerer._model, answerer._processor
    tokenizer = processor.tokenizer

    def following(question, begun):
        ids = (
            tokenize_turns(tokenizer, [(f"<image>\n{question}", "")], 15).input_ids.tolist()
            + tokenizer(begun).input_ids
        )
        from dataio.vqa.conversations import load_rgb

        image = preprocess_image(processor, load_rgb(place))[None]
        return model(input_ids=torch.tensor([ids]), pixel_values=image).logits[0, -1].softmax(-1)

    def share(row, fakes, reals):
        fake, real = (
            sum(float(row[tokenizer(word).input_ids[0]]) for word in words) for words in (fakes, reals)
        )
        return fake / (fake + real)

    words = ([" Fake", " fake"], [" Real", " real"])
    expected = share(following(items[0]["question"], ""), *words)
    assert answerer.p_fake(items[:1], [place]) == [pytest.approx(expected, abs=1e-6)]
    choice = {"id": "c", "question": CHOICE, "ground_truth": "B"}
    assert answerer.p_fake([choice], [place]) == [
        pytest.approx(share(following(CHOICE, ""), [" B"], [" A"]), abs=1e-6)
    ]
    told = {"id": "o", "question": "Explain.", "ground_truth": "This is a fake image."}
    assert answerer.p_fake([told], [place]) == [
        pytest.approx(share(following("Explain.", " This is a"), *words), abs=1e-6)
    ]


def test_a_benchmark_end_to_end(asked, tmp_path):
    folder, items = asked
    answerer = load_for_answers(TINY, 3, choose_device("cpu"))
    answered = answer_benchmark(answerer, folder / "items.json")
    assert [item["id"] for item in answered] == [item["id"] for item in items]
    write_results(tmp_path / "out", answered, compute_vqa_metrics(answered))
    import pandas as pd

    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert list(table["key"]) == [item["id"] for item in items]
    assert table["p_fake"].between(0, 1).all()
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == answered


def test_items_whose_image_is_missing_or_corrupt_are_named(asked, tmp_path):
    folder, items = asked
    (tmp_path / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    bad = [{**items[0], "image": "gone.png"}, {**items[1], "image": "broken.png"}]
    with pytest.raises(UserError, match=r"2 items have no readable image: 0: .*gone\.png.*1: .*broken\.png"):
        check_item_images(bad, tmp_path / "x.json", None)


def test_words_of_several_tokens_are_refused(answerer):
    with pytest.raises(UserError, match="splits ' zebra' into"):
        first_ids(answerer._processor.tokenizer, [" zebra"])


def test_devices_and_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="device cuda:99: not usable here"):
        choose_device("cuda:99")
    with pytest.raises(UserError, match="no such folder"):
        load_for_answers(tmp_path / "none", 1, choose_device("cpu"))


def test_the_tiny_model_is_the_seeds(tmp_path):
    from models.tinyllava.checkpoint import save_tinyllava

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_tinyllava(*load_tinyllava(TINY, seed=seed), tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
