"""Spellings of labels: which are one label, and which one names the photographs."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.layouts.labels import (
    Spelling,
    fold_generators,
    fold_objects,
    is_undecided,
    look_of,
    names_photographs,
    parse_names,
    tidy,
)

# With "~" for a space.
REAL = (
    "nature Nature REAL real photo Photos photographs natural authentic genuine human camera original pristine "
    "0_real 1_real 'real' \"nature\" \u2018real\u2019 real. [real] real-photo RealPhoto realphoto real~images reaL "
    "natural-image bonafide bona~fide human-made \uff52\uff45\uff41\uff4c re\u200bal r\u0435al r\u00adeal \ufeffreal "
    "real\u00a0image original_photos"
)
FAKE = (
    "realvisxl realistic-vision photoshop naturalspeech Real-ESRGAN unreal not-real fake AI generated synthetic "
    "glide coco_real 1_fake unknown humanart class-3 2 sd1.4 DALL-E-3 nautre photon"
)
UNDECIDED = (
    "0 1 1.0 0.0 00 +1 -1 true False YES no nan None NULL n/a - not-fake non-AI real1 real_0 class-0 "
    "PhotoReal label~true n~ature na-ture"
)


def listed(texts):
    return [text.replace("~", " ") for text in texts.split(" ")]


REAL_NAMES, FAKE_NAMES, UNDECIDED_NAMES = listed(REAL), listed(FAKE), listed(UNDECIDED)


def counted(*texts):
    spellings: dict[str, Spelling] = {}
    for line, text in enumerate(texts, start=2):
        spellings.setdefault(text, Spelling(line)).rows += 1
    return spellings


def test_whole_names_for_photographs_are_known_and_parts_of_names_are_not():
    assert [n for n in (*FAKE_NAMES, *UNDECIDED_NAMES) if names_photographs(n)] == []
    assert [n for n in REAL_NAMES if not names_photographs(n)] == []
    assert [n for n in UNDECIDED_NAMES if not is_undecided(n)] == []
    assert [n for n in (*FAKE_NAMES, *REAL_NAMES) if is_undecided(n)] == []


@pytest.mark.parametrize("text", REAL_NAMES)
def test_every_spelling_becomes_nature_and_is_named(text):
    names, notes = fold_generators(counted("glide", text, "nature", text))
    assert names == {"glide": "glide", text: "nature", "nature": "nature"}
    if text != "nature":
        shown = (repr(text), ascii(text))
        assert notes[0] in [f"generator {name} (2 rows): read as photographs, named nature" for name in shown]


@pytest.mark.parametrize("text", FAKE_NAMES)
def test_other_names_are_generators(text):
    names, notes = fold_generators(counted("nature", text))
    assert names == {"nature": "nature", text: text}
    assert all("read as fakes; if they are photographs" in note for note in notes)
    noted = ("Real-ESRGAN", "not-real", "coco_real", "photoshop", "unreal", "nautre", "photon")
    assert bool(notes) == (text in noted)


@pytest.mark.parametrize("text", UNDECIDED_NAMES)
def test_what_nothing_decides_is_refused_until_the_user_decides(text):
    with pytest.raises(ValueError, match=r"line 2\) does not say .*real \(--real NAME\); generators are"):
        fold_generators(counted(text, "other"))
    assert fold_generators(counted(text, "other"), [text])[0] == {text: "nature", "other": "other"}
    assert fold_generators(counted(text, "other"), ["other"])[0] == {text: text, "other": "nature"}


def test_the_users_word_is_the_only_one():
    names, notes = fold_generators(counted("0", "1", "0.0"), ["0"])
    assert names == {"0": "nature", "0.0": "nature", "1": "1"}
    assert notes == ["generator '0' (1 row), '0.0' (1 row): read as photographs, named nature"]
    with pytest.raises(
        ValueError, match=r"real \(--real\) names 'x', and no row has it; generators are '0', '1'"
    ):
        fold_generators(counted("0", "1"), ["x"])
    for other in ("Real", "nature"):
        with pytest.raises(ValueError, match=rf"'{other}' \(line 3\) is a word for photographs, .*list it"):
            fold_generators(counted("0", other), ["0"])
    assert set(fold_generators(counted("coco", "flickr", "sd"), ["coco", "FLICKR"])[0].values()) == {
        "nature",
        "sd",
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ADM", "adm"),
        ("2", "2.0"),
        ("2", "02"),
        ("sd_1", "sd-1"),
        ("sd 1", "SD-1"),
        ("ﬁne", "fine"),
        ("'x'", "x"),
    ],
)
def test_generators_that_look_alike_are_refused_and_objects_are_named(first, second):
    with pytest.raises(ValueError, match=r"\(line 3\) and .* \(line 4\) look alike"):
        fold_generators(counted("nature", first, second))
    names, (note,) = fold_objects(counted(first, "other", second))
    assert names == {text: text for text in (first, second, "other")}
    assert repr(first) in note or ascii(first) in note
    assert "look alike are kept apart" in note and repr(second) in note


@pytest.mark.parametrize(
    "text", ["cafe\u0301", "café\u200b", "\ufeffcafé", "ca\u00adfé", "cafe\u200b\u0301", "\u2060café"]
)
def test_spellings_that_are_certainly_one_are_folded_with_a_note(text):
    for fold in (fold_generators, fold_objects):
        names, notes = fold(counted("nature", "café", text))
        assert names[text] == names["café"] == "café"
        assert any(ascii(text) in note for note in notes)


def test_white_space_inside_and_words_for_nothing():
    names, notes = fold_objects(counted("polar bear", "polar\u00a0bear", "polar  bear", "nan", "", "\u200b"))
    assert set(names.values()) == {"polar bear", "nan", ""} and names["\u200b"] == ""
    assert any("object 'nan' is taken for a name" in note for note in notes)
    with pytest.raises(ValueError, match=r"line 3: generator .* has no visible character"):
        fold_generators(counted("nature", "\u200b"))


def test_lists_of_names():
    assert parse_names('0, real ,"a, b"') == ["0", "real", "a, b"]
    for text in ("", "a,", '"a', 'a"b"', ","):
        with pytest.raises(ValueError, match="names with commas"):
            parse_names(text)


_NOISE = ["", "\u200b", "\ufeff", "\u00ad", " ", "\u00a0", '"', "'", "\u2060"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_disguise_of_a_label_is_another_label(data):
    def disguised(text):
        text = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in text)
        text = unicodedata.normalize(data.draw(st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"])), text)
        noise = st.sampled_from(_NOISE)
        place = data.draw(st.integers(0, len(text)))
        inner = data.draw(st.sampled_from(["", "\u200b", "\u00ad", "\ufeff"]))
        return data.draw(noise) + text[:place] + inner + text[place:] + data.draw(noise)

    real, fake = disguised(data.draw(st.sampled_from(["nature", "real", "photo"]))), disguised("modèle-é")
    assert names_photographs(real) and look_of(fake) == look_of("modèle-é")
    try:
        names, _ = fold_generators(counted("nature", "modèle-é", real, fake))
    except ValueError as error:
        assert "look alike" in str(error) and tidy(fake) != "modèle-é"
    else:
        assert names[real] == "nature" and names[fake] == "modèle-é"
