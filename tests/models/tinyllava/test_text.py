"""Template, tokens and labels: the golden ids, and the rule of the label mask."""

import numpy as np
import pytest
from PIL import Image

from models.tinyllava.model import PHI2, SIGLIP, make_config, tiny_config
from models.tinyllava.text import (
    END,
    IGNORE,
    IMAGE,
    SYSTEM,
    load_tokenizer,
    make_processor,
    preprocess_image,
    render,
    tiny_tokenizer,
    tokenize_turns,
)

# What the published tokenizer gives for "What are these?" about an image (-200), by a third party.
GOLDEN = [
    32,
    8537,
    1022,
    257,
    11040,
    2836,
    290,
    281,
    11666,
    4430,
    8796,
    13,
    383,
    8796,
    3607,
    7613,
    11,
    6496,
    11,
]
GOLDEN += [
    290,
    23507,
    7429,
    284,
    262,
    2836,
    338,
    2683,
    13,
    1294,
    1137,
    25,
    220,
    -200,
    198,
    2061,
    389,
    777,
    30,
]
GOLDEN += [24994, 8808, 8643, 25]


@pytest.fixture(scope="session")
def phi2(shared_data):
    return load_tokenizer(shared_data / "phi2-tokenizer")


def test_the_golden_ids(phi2):
    encoded = tokenize_turns(phi2, [("<image>\nWhat are these?", "")], 728)
    ids = encoded.input_ids.tolist()
    place = ids.index(50295)
    assert len(ids) == 769
    assert ids[place : place + 728] == [50295] * 728
    assert [*ids[:place], -200, *ids[place + 728 :]] == GOLDEN
    assert (encoded.labels == IGNORE).all()


def test_the_verdicts_are_single_tokens(phi2):
    words = {" fake": 8390, " real": 1103, " A": 317, " B": 347}
    assert {word: phi2(word).input_ids for word in words} == {
        word: [number] for word, number in words.items()
    }


@pytest.fixture(scope="module", params=["tiny", "phi2"])
def tokenizer(request):
    return tiny_tokenizer() if request.param == "tiny" else request.getfixturevalue("phi2")


CASES = {
    "one turn": [("<image>\nIs this image real or fake?", "This is a fake image.")],
    "two turns": [("<image>\nReal?", "This is a real image."), ("Why?", "It is a photograph.")],
    "text alone": [("What is a camera?", "It makes a photograph.")],
    "unicode": [("<image>\nWhat is this?", "Ein Häuschen, 猫 and a naïve 🐈.")],
    "spaces": [("<image>\nWhat  is this? ", "two  spaces inside")],
    "leading newline": [("<image>\nWhat?", "\nbelow")],
}


@pytest.mark.parametrize("turns", CASES.values(), ids=CASES.keys())
def test_exactly_the_answers_and_their_ends_are_learnt(tokenizer, turns):
    encoded = tokenize_turns(tokenizer, turns, 4)
    learnt = encoded.labels != IGNORE
    assert (encoded.labels[learnt] == encoded.input_ids[learnt]).all()
    # Read back run by run: each is " " + answer + end.
    runs = np.split(np.arange(len(learnt)), np.flatnonzero(np.diff(learnt)) + 1)
    texts = [tokenizer.decode(encoded.input_ids[run]) for run in runs if learnt[run[0]]]
    assert texts == [f" {answer}{END}" for _, answer in turns]


@pytest.mark.parametrize("turns", CASES.values(), ids=CASES.keys())
def test_the_saved_template_gives_the_same_text(turns):
    tokenizer = tiny_tokenizer()
    processor = make_processor(tokenizer, tiny_config(len(tokenizer), len(tokenizer) - 1, 0))
    messages = []
    for question, answer in turns:
        asked = [{"type": "text", "text": question.replace("<image>\n", "")}]
        if IMAGE in question:
            asked.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    assert processor.apply_chat_template(messages, tokenize=False) == render(turns)[0]
    opened = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opened == render([(turns[0][0], "")])[0]
    assert opened.startswith(SYSTEM) and opened.endswith("ASSISTANT:")


def test_an_image_anywhere_in_the_question_moves_to_its_front(tokenizer):
    front = tokenize_turns(tokenizer, [("<image>\nWhat is this?", "A picture.")], 4)
    back = tokenize_turns(tokenizer, [("What is this?\n<image>", "A picture.")], 4)
    assert front.input_ids.tolist() == back.input_ids.tolist()
    assert (front.images, back.images) == (1, 1)


def test_the_processor_expands_images_as_we_do():
    tokenizer = tiny_tokenizer()
    config = tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE), 0)
    processor = make_processor(tokenizer, config)
    text = render([("<image>\nReal?", "")])[0]
    theirs = processor(text=text, images=Image.new("RGB", (30, 20)))["input_ids"][0]
    assert list(theirs) == tokenize_turns(tokenizer, [("<image>\nReal?", "")], 15).input_ids.tolist()


def test_images_are_squashed_bicubic_and_scaled_to_one():
    tokenizer = tiny_tokenizer()
    processor = make_processor(tokenizer, make_config(PHI2, SIGLIP, image_token_id=50295))
    picture = Image.effect_noise((200, 90), 100).convert("RGB")
    found = preprocess_image(processor, picture).numpy()
    squashed = np.asarray(picture.resize((384, 384), Image.Resampling.BICUBIC), np.float64)
    assert found.shape == (3, 384, 384)
    assert np.abs(found.transpose(1, 2, 0) - (squashed / 255 - 0.5) / 0.5).max() < 1e-6


def test_the_tiny_tokenizer_has_the_words_it_needs_and_loses_nothing():
    tokenizer = tiny_tokenizer()
    for word in (" fake", " real", " Fake", " Real", " A", " B", " C", " D"):
        assert len(tokenizer(word).input_ids) == 1, word
    text = "A naïve 猫, isn't it?\n\tYes  (no)."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
